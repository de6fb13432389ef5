"""Query matching of DETR-like detectors: its plain definition, and that no order of queries matters."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from tempering.methods import QueryKD
from tempering.models.boxes import cornered, giou, match_costs
from tempering.rows import Rows, total
from tests.contract import leaves


def queries(s: int = 4, t: int = 3, *, head: str = "query_sigmoid", layers: tuple[int, int] = (1, 1)) -> Rows:
    """Two images with s and t queries, of three classes; the hard loss is 1 and 2."""
    g = torch.Generator().manual_seed(3)
    pairs = []
    for shift, scale, width in ((0.0, 3.0, 3), (0.1, 0.8, 4)):
        sides = [(layers[0], s), (layers[1], t)]
        draw = torch.randn if width == 3 else torch.rand
        pairs.append(tuple(shift + scale * draw(2, *n, width, generator=g, dtype=torch.float64) for n in sides))
    zeros = torch.zeros(2, 1, dtype=torch.float64)
    features: dict[str, Any] = {head: pairs[0], "query_boxes": pairs[1]}
    return Rows(zeros, zeros, features=features, name="images", task_loss=torch.tensor([1.0, 2.0]).double())


def run(method: QueryKD, rows: Rows) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The terms, and the gradients in the student's logits and boxes."""
    rows, _ = leaves(rows)
    terms = method(rows, 1.0)
    student = {name: s for name, (s, _) in rows.features.items()}
    gradients = torch.autograd.grad(total(terms, rows), list(student.values()))
    return {n: x.detach() for n, x in terms.items()}, dict(zip(student, gradients, strict=True))


def probabilities(logits: Tensor, head: str) -> tuple[Tensor, Tensor]:
    """Those of the classes, and those without the background."""
    p = logits.sigmoid() if head == "query_sigmoid" else logits.softmax(-1)
    return p, p if head == "query_sigmoid" else p[..., :-1]


def plain(rows: Rows, head: str) -> dict[str, Tensor]:
    """The definition, of the last layer: every assignment is tried, and every term is a sum over matched queries."""
    out: dict[str, list[Tensor]] = {"classes": [], "l1": [], "giou": []}
    for i in range(len(rows)):
        (zs, zt), (bs, bt) = ([x[i, -1] for x in rows.features[name]] for name in (head, "query_boxes"))
        (q, seen), (p, taught) = probabilities(zs, head), probabilities(zt, head)
        l1 = torch.stack([torch.stack([(s - t).abs().sum() for s in bs]) for t in bt])
        apart = torch.stack([torch.stack([1 - giou(cornered(s), cornered(t)) for s in bs]) for t in bt])
        unlike = torch.stack([torch.stack([(s - t).abs().sum() for s in seen]) for t in taught])
        cost = (2 * unlike + 5 * l1 + 2 * apart).tolist()
        score = taught.amax(-1)
        kept = score.argsort(descending=True)[: min(len(zs), len(zt))].tolist()
        found = [
            (sum(cost[j][k] for j, k in zip(kept, ks, strict=True)), ks)
            for ks in permutations(range(len(zs)), len(kept))
        ]
        at = (torch.tensor(kept), torch.tensor(min(found)[1]))
        w, p, q = score[at[0]], p[at[0]], q[at[1]]
        kl = (p * (p / q).log()).sum(-1)
        if head == "query_sigmoid":
            kl = kl + ((1 - p) * ((1 - p) / (1 - q)).log()).sum(-1)
        for name, value in {"classes": kl, "l1": l1[at], "giou": apart[at]}.items():
            out[name].append((w * value).sum() / w.sum().clamp_min(1.0))
    return {name: torch.stack(values) for name, values in out.items()}


@pytest.mark.parametrize("head", ["query_sigmoid", "query_softmax"])
@pytest.mark.parametrize(("s", "t"), [(4, 3), (3, 4)])
def test_it_is_its_definition(head: str, s: int, t: int) -> None:
    rows, method = queries(s, t, head=head), QueryKD(classes=0.5, l1=3.0, giou=1.5)
    found, gradients = run(method, rows)
    copied, _ = leaves(rows)
    want = {name: getattr(method, name) * value for name, value in plain(copied, head).items()}
    for name, value in want.items():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-12, atol=1e-12)
        assert found[name].gt(0).all()
    assert found["hard"].tolist() == [1.0, 2.0]
    student = [copied.features[name][0] for name in (head, "query_boxes")]
    slopes = torch.autograd.grad(torch.stack(list(want.values())).sum(0).mean(), student)
    for got, slope in zip(gradients.values(), slopes, strict=True):
        torch.testing.assert_close(got, slope, rtol=1e-10, atol=1e-12)
        assert got.any()


def shuffled(rows: Rows, side: int) -> Rows:
    """The queries of one side in another order, a different one for each image and layer."""
    features = {name: list(pair) for name, pair in rows.features.items()}
    shape = next(iter(features.values()))[side].shape[:3]
    order = torch.rand(shape, generator=torch.Generator().manual_seed(5)).argsort(-1).unsqueeze(-1)
    for pair in features.values():
        pair[side] = pair[side].gather(2, order.expand_as(pair[side]))
    return rows.replace(features={name: tuple(pair) for name, pair in features.items()})


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("head", ["query_sigmoid", "query_softmax"])
def test_no_order_of_queries_matters(head: str, side: int) -> None:
    rows, method = queries(9, 6, head=head, layers=(3, 2)), QueryKD(keep=5)
    torch.testing.assert_close(method(shuffled(rows, side), 1.0), method(rows, 1.0), rtol=1e-12, atol=1e-12)


def test_a_student_with_the_teacher_s_queries_agrees() -> None:
    rows = queries(6, 6)
    same = shuffled(rows.replace(features={name: (t.clone(), t) for name, (_, t) in rows.features.items()}), 0)
    found, gradients = run(QueryKD(hard=0.0), same)
    assert all(float(value.abs().max()) < 1e-12 for value in found.values())
    assert float(gradients["query_sigmoid"].abs().max()) < 1e-12


def test_layers_are_paired_from_the_last_one() -> None:
    rows = queries(4, 4, layers=(3, 2))
    last, both = QueryKD(layers="last")(rows, 1.0), QueryKD()(rows, 1.0)

    def only(layer: int) -> Rows:
        cut = {name: tuple(x[:, layer].unsqueeze(1) for x in pair) for name, pair in rows.features.items()}
        return rows.replace(features=cut)

    for name in QueryKD.weighs:
        torch.testing.assert_close(last[name], QueryKD()(only(-1), 1.0)[name])
        torch.testing.assert_close(both[name], last[name] + QueryKD()(only(-2), 1.0)[name])


def test_an_image_without_objects_teaches_little() -> None:
    rows = queries(9, 9)
    s, t = rows.features["query_sigmoid"]
    nothing = rows.replace(features={**rows.features, "query_sigmoid": (s, t.clamp_max(0.0) - 12.0)})
    found, gradients = run(QueryKD(), nothing)
    assert all(0 <= float(found[name].max()) < 1e-3 for name in QueryKD.weighs)
    assert all(g.isfinite().all() for g in gradients.values())


def test_boxes_of_no_size_have_a_finite_slope() -> None:
    rows = queries()
    boxes = tuple(torch.cat((x[..., :2], torch.zeros_like(x[..., 2:])), -1) for x in rows.features["query_boxes"])
    found, gradients = run(QueryKD(), rows.replace(features={**rows.features, "query_boxes": boxes}))
    assert all(x.isfinite().all() for x in (*found.values(), *gradients.values()))


def test_costs_of_equal_queries_are_the_smallest() -> None:
    p, boxes = torch.rand(1, 5, 3), 0.2 + 0.5 * torch.rand(1, 5, 4)
    costs = match_costs(p, boxes, p, boxes)[0]
    torch.testing.assert_close(costs.diagonal(), torch.zeros(5), rtol=0, atol=1e-6)
    assert costs.argmin(1).tolist() == list(range(5))


def test_messages() -> None:
    rows = queries()
    with pytest.raises(ValueError, match=r"QueryKD matches queries, .* missing: query_sigmoid, query_boxes. tasks"):
        QueryKD()(rows.replace(features={}), 1.0)
    other = rows.features["query_sigmoid"][1][..., :2]
    with pytest.raises(ValueError, match=r"with the same classes in the same order; got \(2, 1, 4, 3\) and"):
        QueryKD()(rows.replace(features={**rows.features, "query_sigmoid": (rows.features["query_sigmoid"][0], other)}))
    with pytest.raises(ValueError, match="QueryKD needs keep >= 1"):
        QueryKD(keep=0)
    anchors = Rows(torch.zeros(2, 3), torch.zeros(2, 3), name="classes")
    assert not any(term.any() for term in QueryKD()(anchors, 1.0).values())
