"""Methods over a detector's neck and sides: their plain definitions, masks, odd boxes, and projectors."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tempering.methods import CWD, DTKD, FGD, KD, LD, MGD, PKD, Imitation, Method, OnBlocks, Sum
from tempering.methods.base import step_rng, step_seed
from tempering.methods.detection.base import NeckMethod
from tempering.methods.detection.fgd import attentions, focus
from tempering.objectives import kl
from tempering.rows import IGNORE_INDEX, Rows, total
from tempering.temperature import Sharpness, Static
from tests.contract import leaves

SIZES = {"p0": (6, 8), "p1": (3, 4)}
BOXES = torch.tensor(
    [
        [[0.1, 0.2, 0.6, 0.7], [0.3, 0.3, 0.45, 0.5]],
        [[-1.0, -1.0, -1.0, -1.0], [-1.0, -1.0, -1.0, -1.0]],  # no box
        [[0.5, 0.5, 0.51, 0.51], [0.9, 0.0, 1.4, 0.3]],  # a pixel of 1/100, and one over the edge
    ],
    dtype=torch.float64,
)
FEATURES = [FGD, MGD, PKD, partial(PKD, standardize_over="image"), CWD, Imitation, partial(Imitation, scored=True)]
BY_IMAGE = [make for make in FEATURES if make is not PKD]


def images(*, student: int = 4, teacher: int = 4, shrunk: int = 1, same: bool = False, **more: Any) -> Rows:
    """Three images with two levels each, the student's ``shrunk`` times smaller; the hard loss is 1, 2 and 3."""
    g = torch.Generator().manual_seed(3)
    features: dict[str, tuple[Tensor, Tensor]] = {}
    for name, (h, w) in SIZES.items():
        t = torch.randn(3, teacher, h, w, generator=g, dtype=torch.float64)
        s = torch.randn(3, student, h // shrunk, w // shrunk, generator=g, dtype=torch.float64)
        features[name] = (t.clone() if same else s, t)
    scores = torch.rand(3, 60, generator=g, dtype=torch.float64)
    features |= {"boxes": (BOXES, BOXES), "scores": (scores, scores)}
    zeros, hard = torch.zeros(3, 1, dtype=torch.float64), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    target = torch.full((3,), IGNORE_INDEX)
    rows = Rows(zeros, zeros, target, features=features, name="images", ids=torch.tensor([7, 3, 5]), task_loss=hard)
    return rows.replace(**more)


def other(name: str) -> Rows:
    """Rows of anchors or sides, five of four classes."""
    s, t = torch.randn(2, 5, 4, dtype=torch.float64)
    return Rows(s.requires_grad_(), t, torch.full((5,), IGNORE_INDEX), name=name)


def ready(make: Any, rows: Rows | None = None, **more: Any) -> Any:
    torch.default_generator.manual_seed(1)
    method = make(**more)
    method.setup(images() if rows is None else rows)
    return method.double()


def terms(method: Method, rows: Rows) -> dict[str, Tensor]:
    torch.default_generator.manual_seed(2)
    return method(rows, 1.0)


def backward(method: Method, rows: Rows) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The terms, and the gradients in the student's levels, all of them finite."""
    rows, _ = leaves(rows)
    found = terms(method, rows)
    levels = {name: rows.features[name][0] for name in SIZES}
    gradients = torch.autograd.grad(total(found, rows), list(levels.values()), allow_unused=True)
    made = {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(levels.items(), gradients, strict=True)}
    assert all(g.isfinite().all() for g in made.values())
    return {name: term.detach() for name, term in found.items()}, made


def close(got: Tensor, want: Any, atol: float = 1e-12) -> None:
    torch.testing.assert_close(got.detach(), torch.as_tensor(want, dtype=got.dtype), rtol=1e-12, atol=atol)


# the plain definitions


def cells(box: list[float], h: int, w: int) -> list[tuple[int, int]]:
    """The cells from floor to ceil of a box, both included, that lie on the grid; () for a box that is none."""
    x0, y0, x1, y1 = box
    if x1 <= 0 or y1 <= 0 or x0 >= 1 or y0 >= 1:
        return []
    x0, y0, x1, y1 = (min(1.0, max(0.0, v)) for v in (x0, y0, x1, y1))
    columns = range(int(x0 * w // 1), int(-(-x1 * w // 1)) + 1)
    rows = range(int(y0 * h // 1), int(-(-y1 * h // 1)) + 1)
    return [(y, x) for y in rows for x in columns]


def plain_focus(boxes: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
    inside = torch.zeros(len(boxes), h, w, dtype=torch.float64)
    for i, own in enumerate(boxes.tolist()):
        for box in own:
            found = cells(box, h, w)
            for y, x in found:
                if y < h and x < w:
                    inside[i, y, x] = max(float(inside[i, y, x]), 1.0 / len(found))
    outside = (inside == 0).double()
    return inside, outside / outside.sum((1, 2), keepdim=True).clamp_min(1)


@torch.no_grad()
def plain_fgd(method: FGD, rows: Rows) -> dict[str, list[float]]:
    out = {name: [0.0] * 3 for name in method.weighs}
    for name, relate in zip(SIZES, method.relations, strict=True):
        s, t = rows.features[name]
        inside, outside = plain_focus(BOXES, *s.shape[2:])
        for i in range(3):
            a, b = s[i], t[i]
            channels, positions = a.shape[0], a[0].numel()
            where = [positions * (x.abs().mean(0) / method.tau).flatten().softmax(0).view_as(x[0]) for x in (a, b)]
            what = [channels * (x.abs().mean((1, 2)) / method.tau).softmax(0) for x in (a, b)]
            for key, mask in (("foreground", inside[i]), ("background", outside[i])):
                error = ((a - b) * mask.sqrt() * where[1].sqrt() * what[1].sqrt()[:, None, None]).square().sum()
                out[key][i] += getattr(method, key) * float(error)
            apart = (where[0] - where[1]).abs().sum() + (what[0] - what[1]).abs().sum()
            out["attention"][i] += method.attention * float(apart)
            related = []
            for x, block in ((a, relate.student), (b, relate.teacher)):
                weight, bias = block.attend.weight[0, :, 0, 0], block.attend.bias
                at = ((weight[:, None, None] * x).sum(0) + bias).flatten().softmax(0)
                pooled = (x.flatten(1) * at).sum(1)
                first, norm, _, last = block.change
                hidden = first.weight[:, :, 0, 0] @ pooled + first.bias
                hidden = F.layer_norm(hidden, hidden.shape, norm.weight.flatten(), norm.bias.flatten()).relu()
                related.append(x + (last.weight[:, :, 0, 0] @ hidden + last.bias)[:, None, None])
            out["relation"][i] += method.relation * float((related[0] - related[1]).square().sum())
    return out


def test_fgd_is_its_definition() -> None:
    rows = images()
    method = ready(FGD, relation=2.0)
    for relate in method.relations:  # as after some steps
        for p in relate.parameters():
            nn.init.normal_(p, std=0.3)
    found, gradients = backward(method, rows)
    want = plain_fgd(method, rows)
    assert set(found) == {*want, "hard"} and all(g.any() for g in gradients.values())
    for name, values in want.items():
        close(found[name], values)
        assert found[name].all() or name == "foreground"
    close(found["hard"], [1.0, 2.0, 3.0])


def test_the_cells_of_boxes() -> None:
    inside, outside = focus(BOXES, (6, 8))
    want = plain_focus(BOXES, 6, 8)
    close(inside, want[0])
    close(outside, want[1])
    assert not inside[1].any() and float(outside[1, 0, 0]) == 1 / 48, "an image without boxes is all background"
    assert int((inside[2] > 0).sum()) == 4 + 3, "a box of less than a cell has its own and the next; one is cut"
    # a whole image, one without a size, one that ends before it begins, and two outside
    odd = [[0.0, 0.0, 1.0, 1.0], [0.5, 0.5, 0.5, 0.5], [0.6, 0.6, 0.4, 0.4]]
    odd += [[1.0, 0.0, 2.0, 1.0], [-2.0, 0.2, 0.0, 0.4]]
    inside, outside = focus(torch.tensor(odd, dtype=torch.float64).unsqueeze(1), (4, 4))
    assert inside[0].allclose(torch.tensor(1 / 25, dtype=torch.float64)) and not outside[0].any()
    assert inside[1].nonzero().tolist() == [[2, 2]] and not inside[2:].any()
    inside, outside = focus(BOXES[:, :0], (2, 2))
    assert not inside.any() and outside.eq(0.25).all()


def test_attentions_have_a_mean_of_one() -> None:
    where, what = attentions(images().features["p0"][1], 0.5)
    close(where.mean((1, 2)), torch.ones(3))
    close(what.mean(1), torch.ones(3))


def test_mgd_is_its_definition() -> None:
    rows, method = images(), ready(MGD, masked=0.4, feature=2.0)
    found, gradients = backward(method, rows)
    torch.default_generator.manual_seed(2)
    draws, shares = method._draws(rows), []
    want = torch.zeros(3, dtype=torch.float64)
    for name, generate in zip(SIZES, method.generators, strict=True):
        s, t = rows.features[name]
        kept = torch.stack([torch.rand(1, *s.shape[2:], generator=g) >= 0.4 for g in draws])
        first, _, second = generate
        made = F.conv2d((s * kept), first.weight, first.bias, padding=1).relu()
        made = F.conv2d(made, second.weight, second.bias, padding=1)
        want += 2.0 * (made - t).square().sum((1, 2, 3))
        assert not gradients[name][~kept.expand_as(s)].any() and gradients[name].any()
        shares.append(1 - kept.double().mean())
    close(found["feature"], want)
    assert 0.3 < float(sum(shares)) / 2 < 0.55


def test_mgd_draws_anew_and_by_its_seed() -> None:
    rows, method = images(), ready(MGD)
    torch.default_generator.manual_seed(2)
    first, second = method(rows, 1.0)["feature"], method(rows, 1.0)["feature"]
    assert not torch.isclose(first, second).any()
    assert torch.equal(terms(method, rows)["feature"], first)
    turned = rows.select(torch.tensor([2, 0, 1]))
    close(terms(method, turned)["feature"], first.detach()[[2, 0, 1]])
    assert terms(method, rows.replace(ids=None))["feature"].isfinite().all()
    everything = terms(ready(MGD, masked=0.0), rows)["feature"]
    assert not torch.isclose(everything, first).any() and terms(ready(MGD, masked=1.0), rows)["feature"].all()


def test_a_step_s_number() -> None:
    """One for all parts and processes of a step; torch's own where there is no engine."""
    found = set()
    for seed, step in ((0, 5), (0, 6), (1, 5)):
        with step_rng(seed, step):
            assert step_seed() == step_seed()
            found.add(step_seed())
    with pytest.raises(KeyError), step_rng(0, 5):
        raise KeyError
    torch.default_generator.manual_seed(4)
    first = step_seed()
    assert len({*found, first, step_seed()}) == 5 and all(0 <= number < 2**63 for number in found)
    torch.default_generator.manual_seed(4)
    assert step_seed() == first


@pytest.mark.parametrize("over", ["batch", "image"])
def test_pkd_is_one_minus_pearson(over: str) -> None:
    rows, method = images(), ready(PKD, standardize_over=over, feature=3.0)
    found, gradients = backward(method, rows)
    want = torch.zeros(3, dtype=torch.float64)
    for name in SIZES:
        s, t = rows.features[name]
        parts = [slice(None)] * 3 if over == "batch" else [slice(i, i + 1) for i in range(3)]
        for i, part in enumerate(parts):
            r = [
                torch.corrcoef(torch.stack((s[part, c].flatten(), t[part, c].flatten())))[0, 1]
                for c in range(s.shape[1])
            ]
            want[i] += 3.0 * (1 - torch.stack(r)).mean()
        assert gradients[name].any()
    close(found["feature"], want)
    assert method.is_batch_dependent() == (over == "batch")
    scaled = {n: (5.0 * s - 2.0, 0.1 * t + 7.0) for n, (s, t) in rows.features.items() if n in SIZES}
    close(terms(method, rows.replace(features=scaled))["feature"], found["feature"], 1e-10)


def test_pkd_of_dead_channels() -> None:
    features = {n: (s.clone(), t.clone()) for n, (s, t) in images().features.items()}
    features["p0"][0][:, 1], features["p1"][1][:, 2] = 3.7, 0.0
    for over in ("batch", "image"):
        _, gradients = backward(ready(PKD, standardize_over=over), images(features=features))
        assert all(float(g.abs().max()) < 100 for g in gradients.values())


def test_cwd_is_its_definition() -> None:
    rows, method = images(), ready(CWD, tau=3.0, feature=0.5)
    found, gradients = backward(method, rows)
    want = torch.zeros(3, dtype=torch.float64)
    for name in SIZES:
        s, t = rows.features[name]
        for i in range(3):
            for c in range(s.shape[1]):
                p, q = ((x[i, c].flatten() / 3.0).softmax(0) for x in (t, s))
                want[i] += 0.5 * 9.0 * (p * (p / q).log()).sum() / s.shape[1]
        assert gradients[name].any()
    close(found["feature"], want)


def test_imitation_is_its_definition() -> None:
    rows, method = images(), ready(Imitation, feature=2.0)
    found, _ = backward(method, rows)
    want = sum(2.0 * (s - t).square().mean((1, 2, 3)) for s, t in (rows.features[n] for n in SIZES))
    close(found["feature"], want)


@pytest.mark.parametrize("anchors", [1, 2])
def test_scored_imitation_is_its_definition(anchors: int) -> None:
    scores = torch.rand(3, 60 * anchors, dtype=torch.float64)
    rows = images()
    rows = rows.replace(features={**rows.features, "scores": (scores, scores)})
    method = ready(Imitation, feature=2.0, scored=True)
    found, gradients = backward(method, rows)
    want, start = torch.zeros(3, dtype=torch.float64), 0
    for (name, (h, w)), project in zip(SIZES.items(), method.projectors, strict=True):
        s, t = rows.features[name]
        a = scores[:, start : start + h * w * anchors].view(3, h, w, anchors).amax(-1)
        start += h * w * anchors
        error = (project(s) - t).square()
        want += 2.0 * ((a[:, None] * error).sum((1, 2, 3)) / (s.shape[1] * a.sum((1, 2)))).detach()
        assert gradients[name].any()
    close(found["feature"], want)
    none = rows.replace(features={**rows.features, "scores": (0 * scores, 0 * scores)})
    assert not backward(method, none)[0]["feature"].any()


def test_ld_is_kd_of_sides_alone() -> None:
    rows = other("sides")
    method = LD(soft=0.5, temperature=Sharpness(3.0))
    close(terms(method, rows)["soft"], 0.5 * kl(rows, Sharpness(3.0)(rows)).detach())
    p, q = ((x / 10.0).log_softmax(-1).detach() for x in (rows.teacher, rows.student))
    close(terms(LD(), rows)["soft"], 0.25 / 17 * 100.0 * (p.exp() * (p - q)).sum(-1))
    total(terms(LD(), rows), rows).backward()
    assert rows.student.grad is not None and rows.student.grad.any()
    anchors, pictures = other("classes"), images()
    assert not terms(LD(), anchors)["soft"].any() and not terms(LD(), pictures)["soft"].any()
    close(terms(LD(hard=2.0), pictures)["hard"], [2.0, 4.0, 6.0])


def test_weights_of_sides_count() -> None:
    """Main region and valuable region: an anchor's weight is its rows'."""
    weight = torch.tensor([1.0, 1.0, 0.25, 0.0, 0.25], dtype=torch.float64)
    rows = other("sides").replace(weight=weight)
    soft = kl(rows, Static(10.0)(rows)).detach()
    close(total({"soft": terms(LD(soft=1.0), rows)["soft"]}, rows), float((soft * weight).sum() / weight.sum()))


# what all of them promise


@pytest.mark.parametrize("make", FEATURES)
def test_other_blocks_get_nothing(make: Any) -> None:
    method = make()
    for name in ("classes", "sides"):
        rows = other(name)
        method.setup(rows)
        found = terms(method, rows)
        assert set(found) == set(method.weighs)
        total(found, rows).backward()
        assert rows.student.grad is not None and not rows.student.grad.any()
    assert not len(method.projectors), "anchors tell nothing of the neck"


@pytest.mark.parametrize("make", [FGD, PKD, CWD, Imitation])
def test_zero_at_identical_levels(make: Any) -> None:
    rows = images(same=True)
    method = ready(make, rows)
    assert method.zero_when_equal
    found, gradients = backward(method, rows)
    for name in method.weighs:
        assert bool((found[name].abs() <= 1e-12).all())
    assert all(float(g.abs().max()) < 1e-10 for g in gradients.values())


@pytest.mark.parametrize("make", FEATURES)
def test_it_is_said_whether_agreement_is_zero(make: Any) -> None:
    assert not make().zero_when_equal, "nothing is known before the levels are seen"
    assert not ready(make, images(student=5)).zero_when_equal
    if make is FGD:
        method = ready(FGD)
        with torch.no_grad():
            method.relations[0].teacher.change[3].bias += 0.1
        assert not method.zero_when_equal and terms(method, images(same=True))["relation"].all()


@pytest.mark.parametrize("make", BY_IMAGE)
def test_an_image_by_itself(make: Any) -> None:
    rows, method = images(), ready(make)
    assert not method.is_batch_dependent()
    whole, _ = backward(method, rows)
    for i in range(3):
        alone, _ = backward(method, rows.select(slice(i, i + 1)))
        for name, value in whole.items():
            close(alone[name], value[i : i + 1])


@pytest.mark.parametrize("make", FEATURES)
def test_images_of_no_weight_take_no_part(make: Any) -> None:
    rows, method = images(), ready(make)
    weight = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
    broken = {n: (s.clone(), t.clone()) for n, (s, t) in rows.features.items()}
    for pair in broken.values():
        for x in pair:
            x[1] = torch.nan
    kept = torch.tensor([0, 2])
    _, want = backward(method, rows.replace(weight=weight).select(kept))
    found, gradients = backward(method, rows.replace(weight=weight, features=broken))
    assert all(v[1] == 0 for n, v in found.items() if n != "hard" and method.relational is False)
    for name, g in gradients.items():
        close(g[kept], want[name])
        assert not g[1].any()
    nobody = rows.replace(weight=torch.zeros(3, dtype=torch.float64))
    found, gradients = backward(method, nobody)
    assert float(total(found, nobody)) == 0.0 and not any(g.any() for g in gradients.values())


@pytest.mark.parametrize("make", FEATURES)
@pytest.mark.parametrize(("channels", "shrunk"), [(6, 1), (4, 2), (3, 2)])
def test_other_widths_and_sizes(make: Any, channels: int, shrunk: int) -> None:
    rows = images(student=channels, shrunk=shrunk)
    method = ready(make, rows)
    found, gradients = backward(method, rows)
    assert all(found[name].isfinite().all() for name in method.weighs) and all(g.any() for g in gradients.values())
    trained = [p for group in method.param_groups() for p in group["params"]]
    assert len(trained) == len(list(method.parameters())) and (channels == 4 or len(trained) >= 4)
    loss = total(terms(method, rows), rows)
    assert loss.requires_grad == bool(trained)
    if trained:
        loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    again = ready(make, rows)
    again.load_state_dict(method.state_dict())
    for name, value in terms(again, rows).items():
        close(value, terms(method, rows)[name].detach(), 0.0)


@pytest.mark.parametrize("make", FEATURES)
def test_one_channel_and_one_cell(make: Any) -> None:
    maps = {"p0": (torch.randn(2, 1, 1, 1).double(), torch.randn(2, 1, 1, 1).double())}
    scores = torch.rand(2, 1).double()
    features = maps | {"boxes": (BOXES[:2], BOXES[:2]), "scores": (scores, scores)}
    zeros = torch.zeros(2, 1, dtype=torch.float64)
    rows, _ = leaves(Rows(zeros, zeros, features=features, name="images", task_loss=zeros[:, 0]))
    method = ready(make, rows)
    loss = total(terms(method, rows), rows)
    loss.backward()
    assert loss.isfinite()


def test_levels_are_found_in_their_order() -> None:
    x = torch.zeros(1, 1, 1, 1)
    names = ("p10", "boxes", "p2", "p", "scores", "p0", "mine")
    rows = Rows(x[:, :, 0, 0], x[:, :, 0, 0], features=dict.fromkeys(names, (x, x)), name="images")
    assert FGD().chosen(rows) == ("p0", "p2", "p10") and FGD(names=["mine"]).chosen(rows) == ("mine",)
    assert FGD().select_features(["stage1", "stage2"]) == ()


def test_a_sum_teaches_neck_and_classes() -> None:
    method = Sum(FGD(), OnBlocks(DTKD(hard=0.0), blocks=["classes"]), LD(hard=0.0))
    blocks = [other("classes"), other("sides"), images()]
    method.setup(blocks[-1])
    method = method.double()
    found = [terms(method, rows) for rows in blocks]
    assert found[0]["onblocks.dynamic"].any() and not found[0]["ld.soft"].any() and not found[0]["fgd.relation"].any()
    assert "onblocks.elsewhere" in found[1] and found[1]["ld.soft"].any()
    assert found[2]["fgd.foreground"].any() and not found[2]["ld.soft"].any()
    close(found[2]["fgd.hard"], [1.0, 2.0, 3.0])
    assert len(method.param_groups()) == 1
    copy.deepcopy(method)


def test_only_some_blocks() -> None:
    method = OnBlocks(KD(soft=2.0), blocks=("classes", "mine"))
    rows = other("mine")
    for name, value in KD(soft=2.0)(rows, 1.0).items():
        close(method(rows, 1.0)[name], value.detach())
    assert not method(other("sides"), 1.0)["elsewhere"].any()
    with pytest.raises(TypeError, match=r"OnBlocks needs a method over rows, such as KD\(hard=0.0\); got 'kd'"):
        OnBlocks("kd")
    with pytest.raises(ValueError, match=r"OnBlocks needs blocks to be a list, each text; got 'classes'"):
        OnBlocks(KD(), blocks="classes")


def test_messages() -> None:
    rows = images()
    bare = rows.replace(features={n: rows.features[n] for n in SIZES})
    with pytest.raises(ValueError, match=r"FGD needs the boxes of each image, .* no feature 'boxes'. tasks"):
        ready(FGD)(bare, 1.0)
    with pytest.raises(ValueError, match=r"no feature 'scores'"):
        ready(Imitation, scored=True)(bare, 1.0)
    with pytest.raises(ValueError, match=r"the same number of anchors at each of 60 positions; got 7 scores"):
        few = torch.rand(3, 7)
        ready(Imitation, scored=True)(rows.replace(features={**rows.features, "scores": (few, few)}), 1.0)
    with pytest.raises(ValueError, match=r"tasks.Detection gives the levels of both necks as 'p0', 'p1'"):
        ready(CWD)(rows.replace(features={}), 1.0)
    with pytest.raises(ValueError, match=r"PKD was set up for 2 levels; got 1. Construct a new one"):
        ready(PKD)(rows.replace(features={"p0": rows.features["p0"]}), 1.0)
    with pytest.raises(RuntimeError, match=r"MGD has projectors .* call method.setup\(rows\)"):
        MGD()(rows, 1.0)
    for make, said in (
        (lambda: FGD(attention=-1.0), "FGD needs attention >= 0"),
        (lambda: FGD(tau=0.0), "FGD needs tau > 0"),
        (lambda: MGD(masked=1.5), r"MGD needs masked in \[0, 1\].*got 1.5"),
        (lambda: PKD(standardize_over="channel"), "PKD needs standardize_over 'batch' or 'image'; got 'channel'"),  # pyright: ignore
        (lambda: CWD(tau=-1.0), "CWD needs tau > 0"),
    ):
        with pytest.raises(ValueError, match=said):
            make()
    assert issubclass(FGD, NeckMethod)
