"""Feature methods: the authors' numbers, what each promises, and projectors that the method owns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tempering.methods.features.at import AT
from tempering.methods.features.crd import CRD
from tempering.methods.features.fitnet import FitNet
from tempering.methods.features.nst import NST
from tempering.methods.features.pkt import PKT
from tempering.methods.features.reviewkd import ReviewKD
from tempering.methods.features.rkd import RKD
from tempering.methods.features.simkd import ReusedHead, SimKD
from tempering.methods.features.sp import SP
from tempering.methods.features.vid import VID
from tempering.rows import Rows, total
from tests.paths import SHARED, needs_shared

MAPS = {"early": ((6, 5, 8, 8), (6, 7, 8, 8)), "late": ((6, 8, 4, 4), (6, 10, 4, 4))}
VECTORS = {"pooled": ((6, 16), (6, 24))}


def block(shapes: dict, *, seed: int = 0, weight: Tensor | None = None, same: bool = False) -> Rows:
    """Rows with features that require grad on the student's side."""
    g = torch.Generator().manual_seed(seed)
    features = {}
    for name, (s, t) in shapes.items():
        teacher = torch.randn(*t, generator=g, dtype=torch.float64)
        student = teacher.clone() if same else torch.randn(*s, generator=g, dtype=torch.float64)
        features[name] = (student.requires_grad_(), teacher)
    n = next(iter(shapes.values()))[0][0]
    logits = torch.randn(n, 4, generator=g, dtype=torch.float64)
    return Rows(logits, logits.clone(), torch.arange(n) % 4, weight, features, ids=torch.arange(n))


def golden(case: str, names: list[tuple[str, str]]) -> tuple[Rows, dict[str, Tensor]]:
    with np.load(SHARED / "golden" / "features.npz", allow_pickle=False) as file:
        prefix = f"{case}__"
        names_here = [k for k in file if k.startswith(prefix) and "config" not in k]
        found = {k[len(prefix) :]: torch.from_numpy(file[k]) for k in names_here}
    features = {s: (found[s].clone().requires_grad_(), found[t]) for s, t in names}
    n = len(found[names[0][0]])
    z = torch.zeros(n, 4, dtype=torch.float64)
    return Rows(z, z, torch.zeros(n, dtype=torch.long), features=features), found


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got.detach(), wanted.reshape(got.shape), rtol=1e-9, atol=1e-11)


STAGES = [("student_feat0", "teacher_feat0"), ("student_feat1", "teacher_feat1")]
EMBED = [("student_embed", "teacher_embed")]


@needs_shared
@pytest.mark.parametrize(
    ("case", "method", "names", "grads"),
    [
        ("at", AT(feature=1.0, hard=0.0), STAGES, ["grad_feat0", "grad_feat1"]),
        ("at_pool", AT(feature=1.0, hard=0.0), STAGES[:1], ["grad_feat0"]),
        ("nst", NST(feature=1.0, hard=0.0), STAGES, ["grad_feat0", "grad_feat1"]),
        ("nst_pool", NST(feature=1.0, hard=0.0), STAGES[:1], ["grad_feat0"]),
        ("sp", SP(feature=1.0, hard=0.0), STAGES[1:], ["grad_feat1"]),  # the released code takes the last stage
        ("pkt", PKT(feature=1.0, hard=0.0), EMBED, ["grad"]),
        ("rkd", RKD(hard=0.0), EMBED, ["grad"]),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_authors_numbers(case, method, names, grads) -> None:
    rows, found = golden(case, names)
    loss = total(method(rows), rows)
    close(loss, found["loss"])
    for gradient, name in zip(torch.autograd.grad(loss, [rows.features[s][0] for s, _ in names]), grads, strict=True):
        close(gradient, found[name])


@needs_shared
def test_rkd_parts() -> None:
    rows, found = golden("rkd", EMBED)
    close(total(RKD(distance=1.0, angle=0.0, hard=0.0)(rows), rows), found["distance"])
    close(total(RKD(distance=0.0, angle=1.0, hard=0.0)(rows), rows), found["angle"])


@needs_shared
def test_vid_on_the_golden_regressor() -> None:
    rows, found = golden("vid", STAGES[:1])
    method = VID(hard=0.0)
    method.setup(rows)
    guess = method.projectors[0]
    guess.mean = guess.mean[:3]  # the golden regressor has two convolutions, the released one three
    with torch.no_grad():
        guess.mean[0].weight.copy_(found["w0"])
        guess.mean[2].weight.copy_(found["w2"])
        guess.scale.copy_(found["log_scale"])
    loss = total(method(rows), rows)
    close(loss, found["loss"])
    leaves = [rows.features["student_feat0"][0], guess.scale, guess.mean[0].weight, guess.mean[2].weight]
    for gradient, name in zip(
        torch.autograd.grad(loss, leaves), ("grad_feat0", "grad_log_scale", "grad_w0", "grad_w2"), strict=True
    ):
        close(gradient, found[name])


@needs_shared
@pytest.mark.parametrize("case", ["fitnet_same", "fitnet_stride2", "fitnet_up2", "fitnet_shrink"])
def test_fitnet_with_the_golden_regressor(case: str) -> None:
    rows, found = golden(case, [("student_feat", "teacher_feat")])
    method = FitNet(hard=0.0)
    method.setup(rows)
    conv, norm, _ = method.projectors[0]
    with torch.no_grad():
        for module, name in ((conv, "conv"), (norm, "bn")):
            module.weight.copy_(found[f"reg_{name}_weight"])
            module.bias.copy_(found[f"reg_{name}_bias"])
    loss = total(method(rows), rows)
    close(loss, 100.0 * found["mse_unweighted"])
    leaves = [rows.features["student_feat"][0], conv.weight, norm.bias]
    for gradient, name in zip(
        torch.autograd.grad(loss, leaves), ("grad_feat", "grad_reg_conv_weight", "grad_reg_bn_bias"), strict=True
    ):
        close(gradient, found[name])


@pytest.mark.parametrize("method", [AT(hard=0.0), NST(hard=0.0), SP(hard=0.0), SimKD(hard=0.0)])
def test_zero_at_identical_maps(method) -> None:
    rows = block({"last": ((6, 5, 4, 4), (6, 5, 4, 4))}, same=True)
    loss = total(method(rows), rows)
    loss.backward()
    assert float(loss.detach()) < 1e-12


@pytest.mark.parametrize("method", [PKT(hard=0.0), RKD(hard=0.0)])
def test_zero_at_identical_vectors(method) -> None:
    rows = block({"pooled": ((6, 5), (6, 5))}, same=True)
    loss = total(method(rows), rows)
    loss.backward()
    assert abs(float(loss.detach())) < 1e-9
    assert torch.isfinite(rows.features["pooled"][0].grad).all()


def prepared(method, shapes):
    method.setup(block(shapes))
    return method


METHODS = {
    "AT": (lambda: AT(hard=0.0), MAPS),
    "NST": (lambda: NST(hard=0.0), MAPS),
    "SP": (lambda: SP(hard=0.0), MAPS),
    "PKT": (lambda: PKT(hard=0.0), VECTORS),
    "RKD": (lambda: RKD(hard=0.0), VECTORS),
    "VID": (lambda: prepared(VID(hard=0.0), MAPS), MAPS),
    "FitNet": (lambda: prepared(FitNet(hard=0.0), MAPS), MAPS),
    "ReviewKD": (lambda: prepared(ReviewKD(hard=0.0, middle=8), MAPS), MAPS),
}


@pytest.mark.parametrize("name", METHODS)
def test_order_of_rows_does_not_matter(name: str) -> None:
    make, shapes = METHODS[name]
    method, rows = make(), block(shapes)
    turned = rows.replace(
        features={k: (s.flip(0), t.flip(0)) for k, (s, t) in rows.features.items()}, target=rows.target.flip(0)
    )
    assert float(total(method(rows), rows).detach()) == pytest.approx(float(total(method(turned), turned).detach()))


@pytest.mark.parametrize("name", METHODS)
def test_rows_of_no_weight_take_no_part(name: str) -> None:
    make, shapes = METHODS[name]
    method = make()
    weight = torch.tensor([1.0, 1, 1, 1, 0, 0], dtype=torch.float64)
    rows = block(shapes, weight=weight)
    fewer = Rows(
        rows.student[:4],
        rows.teacher[:4],
        rows.target[:4],
        features={k: (s[:4], t[:4]) for k, (s, t) in rows.features.items()},
    )
    loss = total(method(rows), rows)
    assert float(loss.detach()) == pytest.approx(float(total(method(fewer), fewer).detach()), rel=1e-9)
    loss.backward()
    for student, _ in rows.features.values():
        assert not student.grad[4:].any()
        assert student.grad[:4].any()


@pytest.mark.parametrize("name", METHODS)
def test_all_rows_masked_goes_backward(name: str) -> None:
    make, shapes = METHODS[name]
    rows = block(shapes, weight=torch.zeros(6, dtype=torch.float64))
    rows = rows.replace(student=rows.student.clone().requires_grad_())
    loss = total(make()(rows), rows)
    loss.backward()
    assert float(loss.detach()) == 0.0


def test_crd_learns_to_tell_samples_apart() -> None:
    torch.manual_seed(0)
    method = CRD(samples=32, negatives=16, size=8, hard=0.0)
    g = torch.Generator().manual_seed(1)
    teacher = torch.randn(32, 24, generator=g)
    student = nn.Linear(24, 16)
    logits = torch.zeros(32, 4)

    def rows() -> Rows:
        return Rows(logits, logits, features={"pooled": (student(teacher), teacher)}, ids=torch.arange(32))

    method.setup(rows())
    optimizer = torch.optim.Adam([*student.parameters(), *method.parameters()], lr=0.01)
    losses = []
    for _ in range(60):
        made = rows()
        loss = total(method(made), made)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert {"student_memory", "teacher_memory", "student_whole"} <= set(method.state_dict())


def test_reused_head_is_the_teachers_and_frozen() -> None:
    head = nn.Linear(12, 5)
    net = ReusedHead(nn.Conv2d(3, 6, 3, padding=1), 6, 12, head)
    out = net(torch.randn(2, 3, 8, 8))
    out.sum().backward()
    assert out.shape == (2, 5)
    assert net.head.weight is head.weight and head.weight.grad is None
    assert net.trunk.weight.grad is not None


def test_messages() -> None:
    rows = block(VECTORS)
    with pytest.raises(ValueError, match=r"AT compares features.*missing: \['mid'\].*Name modules to tap"):
        AT(names=("mid",))(rows)
    with pytest.raises(ValueError, match=r"AT compares maps.*'pooled' is \(6, 16\)"):
        AT()(rows)
    with pytest.raises(RuntimeError, match=r"call method.setup\(rows\)"):
        FitNet()(block(MAPS))
    with pytest.raises(ValueError, match="no regressor from a 4 x 4 map to 16 x 16"):
        FitNet().setup(block({"x": ((2, 3, 4, 4), (2, 3, 16, 16))}))
    with pytest.raises(ValueError, match="CRD remembers samples by id"):
        crd = CRD(samples=8, negatives=2, size=4)
        crd.setup(rows)
        crd(rows.replace(ids=None))
