"""The fifteen corruptions: their parts against scipy, their growth, their seeds, their ranges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tempering.audits import blurs, weather
from tempering.audits.corruptions import CORRUPTIONS, SEVERITIES, corrupt

NAMES = ["gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur"]
NAMES += ["snow", "frost", "fog", "brightness", "contrast", "elastic", "pixelate", "jpeg"]


def pictures(n: int = 6, channels: int = 3, size: int = 32) -> Tensor:
    coarse = torch.rand(n, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    return (nn.functional.interpolate(coarse, size=size, mode="bilinear").clamp(0, 1) * 255).round() / 255


def test_all_fifteen_are_there() -> None:
    assert list(CORRUPTIONS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_one_is_in_range_and_the_same_from_a_seed(name: str) -> None:
    if name in ("pixelate", "jpeg"):
        pytest.importorskip("PIL")
    p = pictures()
    before, state = p.clone(), torch.get_rng_state()
    for severity in SEVERITIES:
        made = corrupt(p, name, severity, seed=3)
        assert made.shape == p.shape and float(made.min()) >= 0 and float(made.max()) <= 1
        assert torch.allclose(made * 255, (made * 255).round(), atol=1e-3) and not torch.equal(made, p)
        assert torch.equal(made, corrupt(p, name, severity, seed=3))
    other = corrupt(p, name, 5, seed=4)
    assert torch.equal(p, before) and torch.equal(state, torch.get_rng_state())
    drawn = name not in ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg")
    assert torch.equal(other, made) != drawn


@pytest.mark.parametrize("name", ["glass_blur", "motion_blur", "zoom_blur", "snow", "frost", "fog", "elastic"])
@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (1, 3, 5, 9), (2, 4, 1, 1), (0, 3, 8, 8), (2, 3, 64, 64)])
def test_other_sizes_and_channels(name: str, shape: tuple[int, ...]) -> None:
    for severity in SEVERITIES:
        made = corrupt(torch.full(shape, 0.5), name, severity)
        assert made.shape == shape and made.isfinite().all()


@pytest.mark.parametrize("name", ["glass_blur", "motion_blur", "zoom_blur", "elastic"])
def test_what_moves_pixels_leaves_one_color_alone(name: str) -> None:
    flat = torch.full((2, 3, 32, 32), 100 / 255)
    assert (corrupt(flat, name, 5) * 255 - 100).abs().max() <= 1.001


# what grows


def test_frost_hides_more_of_the_image() -> None:
    p, hidden = pictures(20), []
    for severity in SEVERITIES:
        both = torch.stack([x.flatten() for x in (p, corrupt(p, "frost", severity))])
        hidden.append(1 - float(torch.corrcoef(both)[0, 1]))
    assert hidden == sorted(hidden) and hidden[0] > 0 and hidden[-1] > 2 * hidden[0]


def test_elastic_bends_more_though_it_moves_less() -> None:
    line = torch.linspace(0.2, 0.8, 64)
    p = torch.stack((line.expand(64, 64), line[:, None].expand(64, 64)))[:, None].repeat(8, 1, 1, 1)
    made = [blurs.elastic(p, at, torch.Generator().manual_seed(0)) for at in range(5)]
    # an affine map leaves a line a line, away from the mirrored borders
    inside = [m[:, 0, 16:-16, 16:-16] for m in made]
    bent = [float(sum(m.diff(n=2, dim=d).abs().mean() for d in (1, 2))) for m in inside]
    moved = [float((m - p).abs().mean()) for m in made]
    assert bent[0] < 1e-6 and bent == sorted(bent) and bent[4] > 2 * bent[2] and moved[4] < moved[0]


def test_glass_blur_goes_twice_round_and_smears_more() -> None:
    p = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    made = [corrupt(p, "glass_blur", severity) for severity in SEVERITIES]
    sharp = [float(m.diff(dim=-1).abs().mean()) for m in made]
    assert sharp[0] > sharp[1] > sharp[2] and sharp[3] > sharp[4]
    smooth = pictures()
    moved = [float((corrupt(smooth, "glass_blur", s) - smooth).abs().mean()) for s in SEVERITIES]
    assert min(moved[3:]) > 1.3 * max(moved[:3])


# the parts, against others


@pytest.mark.parametrize(
    ("border", "mode"), [(blurs._edge, "nearest"), (blurs._mirror, "reflect"), (blurs._mirror_101, "mirror")]
)
@pytest.mark.parametrize("sigma", [0.05, 0.4, 1.28, 6.4])
def test_blurred_is_scipy_s(border: blurs.Border, mode: str, sigma: float) -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    p = torch.rand(2, 1, 9, 32, dtype=torch.float64)
    want = np.stack([ndimage.gaussian_filter(x[0], sigma, mode=mode, truncate=3.0) for x in p.numpy()])
    torch.testing.assert_close(blurs.blurred(p, sigma, border, truncate=3)[:, 0], torch.from_numpy(want))


@pytest.mark.parametrize("by", [1.0, 1.07, 1.75, 2.25])
def test_zoomed_is_scipy_s(by: float) -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    p = torch.rand(1, 1, 32, 32, dtype=torch.float64)
    cut = int(np.ceil(32 / by))
    top = (32 - cut) // 2
    want = ndimage.zoom(p[0, 0, top : top + cut, top : top + cut].numpy(), by, order=1)
    trim = (want.shape[0] - 32) // 2
    torch.testing.assert_close(blurs.zoomed(p, by)[0, 0], torch.from_numpy(want[trim : trim + 32, trim : trim + 32]))


def test_sampled_is_scipy_s() -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    p = torch.rand(1, 1, 8, 12, dtype=torch.float64)
    rows, cols = (30 * torch.rand(1, 8, 12, dtype=torch.float64) - 10 for _ in range(2))
    for border, mode in ((blurs._mirror, "reflect"), (blurs._mirror_101, "mirror")):
        want = ndimage.map_coordinates(p[0, 0].numpy(), [rows[0].numpy(), cols[0].numpy()], order=1, mode=mode)
        torch.testing.assert_close(blurs.sampled(p, rows, cols, border)[0, 0], torch.from_numpy(want))


def test_smeared_along_its_line() -> None:
    dot = torch.zeros(2, 1, 9, 9)
    dot[:, :, 4, 4] = 1
    across, down = blurs.smeared(dot, 3, 1.0, torch.tensor([0.0, 90.0]))
    kernel = torch.exp(-(torch.arange(5.0) ** 2) / 2) / torch.exp(-(torch.arange(7.0) ** 2) / 2).sum()
    # a pixel takes from those to its right: the dot trails to the left
    torch.testing.assert_close(across[0, 4, :5].flip(0), kernel)
    torch.testing.assert_close(down[0, :5, 4].flip(0), kernel)
    assert float(across[0].sum()) == pytest.approx(float(across[0, 4].sum()))


def test_a_fractal_fills_its_range_and_is_rougher_with_less_decay() -> None:
    p = torch.zeros(40, 3, 32, 24)
    rough = []
    for decay in (3.0, 2.0, 1.5):
        made = weather.plasma(p, decay, torch.Generator().manual_seed(0))
        assert made.shape == (40, 1, 32, 24) and float(made.min()) >= 0 and float(made.max()) <= 1
        rough.append(float(made.diff(dim=2).abs().mean()))
    assert rough == sorted(rough)
    whole = weather.plasma(torch.zeros(3, 3, 32, 32), 2.0, torch.Generator().manual_seed(0))
    assert (whole.amin((1, 2, 3)) == 0).all() and (whole.amax((1, 2, 3)) == 1).all()


def test_fog_keeps_the_brightest_value_and_snow_falls_from_both_sides() -> None:
    p = pictures()
    assert float(corrupt(p, "fog", 5).amax()) <= float(p.amax()) + 1e-6
    black = corrupt(torch.zeros(4, 3, 32, 32), "snow", 3)
    assert torch.equal(black, black.flip(2, 3)) and float(black.max()) > 0.1
