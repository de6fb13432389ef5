"""KDExplainer: the explainer student, its routing and its tree; attention over virtual blocks; figures and records."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tempering import distill, models
from tempering.audits.explanation import Explanation
from tempering.audits.trees import adjusted_rand, branches, compared
from tempering.experiments.presets import preset_from, run_label
from tempering.methods import Explainer as Method
from tempering.models import build, load, network_facts
from tempering.models.attention import attend, entropies, entropy, merge_attention
from tempering.models.explainer import Explainer, Routing, adam, halving, optimizer_and_schedule, rate, restart
from tempering.reports.page import render
from tempering.reports.records import load_run
from tempering.reports.trees import is_complete, tree_figure, write_figures
from tempering.rows import IGNORE_INDEX
from tempering.teachers import Live
from tempering.training.schedules import cifar_decay, cifar_lr, cifar_sgd
from tempering.utils.hooks import FeatureExtractor
from tests.contract import Lesson
from tests.records_made import make_run
from tests.test_audits import by_name

LEVELS = ["stage2", "stage3", "classes"]


def small(classes: int = 5, **options: Any) -> Explainer:
    torch.default_generator.manual_seed(0)
    sizes: dict[str, Any] = {"experts": (2, 3, 4), "inner": 4, "widths": (4, 4, 3), "side": 2, "hidden": 6}
    return Explainer(classes=classes, channels=1, **sizes | options)


def images(n: int = 12, size: int = 16) -> Tensor:
    return torch.randn(n, 1, size, size, generator=torch.Generator().manual_seed(1))


# the explainer


def test_the_published_sizes() -> None:
    net = build("explainer", classes=100)
    assert isinstance(net, Explainer) and net.stages == ["stage1", "stage2", "stage3"]
    leaf = 1568 * 128 + 128 + 128 * 128 + 128 + 128 + 1
    experts = [
        (2, 3 * 64 + 64 * 64, 128),
        (4, 64 * 64 + 64 * 64, 128),
        (8, 64 * 64 + 64 * 32, 96),
    ]  # of one expert: what two 3x3 convolutions join, and the maps that are normalized
    want = 100 * leaf + sum(n * (9 * joined + 2 * maps) for n, joined, maps in experts) + 4 * 2 + 8 * 4 + 100 * 8
    assert sum(p.numel() for p in net.parameters()) == want
    with FeatureExtractor(net, models.stages(net)) as taps, torch.no_grad():
        assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 100)
        assert [tuple(taps[s].shape[1:]) for s in net.stages] == [(128, 16, 16), (256, 8, 8), (256, 4, 4)]
    for name, side, channels in (("explainer_small", 32, 3), ("explainer_digits", 8, 1)):
        assert build(name, classes=7, channels=channels)(torch.zeros(2, channels, side, side)).shape == (2, 7)


def test_each_expert_is_a_net_of_its_own() -> None:
    """The grouped form against the text: one expert at a time, on the mixture of its parents."""
    net = small().double().eval()
    x, routes = images().double(), net.routings()

    def expert(stage: nn.Module, k: int, n: int, x: Tensor, own: bool) -> Tensor:
        for layer in stage.children():
            if isinstance(layer, nn.Conv2d):
                w = layer.weight.chunk(n)[k]
                x = nn.functional.conv2d(x, w, padding=1)
            elif isinstance(layer, nn.BatchNorm2d):
                x = x / math.sqrt(1 + layer.eps)
            else:
                x = layer(x)
        return x

    with torch.no_grad():
        got, level = net(x), [expert(net.stage1, k, 2, x, False) for k in range(2)]
        for name, n in (("stage2", 3), ("stage3", 4)):
            a = routes[name].attends()
            mixed = [sum(a[i, j] * level[j] for j in range(len(level))) for i in range(n)]
            level = [expert(getattr(net, name), k, n, mixed[k], True) for k in range(n)]
        a, (first, _, _, second, _, _, third) = routes["head"].attends(), net.head.layers
        for k in range(5):
            z = net.pool(sum(a[k, j] * level[j] for j in range(4)))
            z = torch.relu(z @ first.weight[k] + first.bias[k])
            z = torch.relu(z @ second.weight[k] + second.bias[k])
            torch.testing.assert_close(z @ third.weight[k] + third.bias[k], got[:, k : k + 1], rtol=1e-10, atol=1e-12)


def test_soft_hard_and_annealed_routing() -> None:
    route = Routing(3, 4).double()
    p = (route.alpha / 0.5).softmax(-1)
    for t in (10.0, 1.0, 1 / 30):
        route.anneal(t)
        torch.testing.assert_close(route.attends(), (p.log() / t).softmax(-1))
    torch.testing.assert_close(route.attends(1.0), p)
    route.harden()
    hard = route.attends()
    assert torch.equal(hard, torch.eye(4, dtype=torch.float64)[p.argmax(-1)]) and not route.alpha.requires_grad
    route.anneal(10.0)
    assert torch.equal(route.attends(), hard), "hard stays hard"
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    assert torch.equal(route(x), x[:, p.argmax(-1)])


def test_entropies_have_gradients_where_a_share_is_zero() -> None:
    route = Routing(2, 3)
    with torch.no_grad():
        route.alpha.copy_(torch.tensor([[0.0, 40.0, 90.0], [1.0, 1.0, 1.0]]))
    for t in (1 / 30, 0.0):
        route.temperature.fill_(t)
        (slope,) = torch.autograd.grad(route.attention_entropy(), route.alpha)
        assert slope.isfinite().all()
    assert route.attention_entropy().item() == 0.0
    route.temperature.fill_(1.0)
    assert route.attention_entropy().item() == pytest.approx(math.log(3) / 2, abs=1e-6)


def test_the_tree_is_plain_and_says_who_hears_whom() -> None:
    net = small()
    net.routings()["head"].anneal(0.5)
    tree = json.loads(json.dumps(net.tree()))
    assert [level["level"] for level in tree] == LEVELS and [level["parents"] for level in tree] == [2, 3, 4]
    assert [len(level["parent"]) for level in tree] == [3, 4, 5] and is_complete(tree)
    for level in tree:
        a = torch.tensor(level["attention"], dtype=torch.float64)
        assert level["parent"] == a.argmax(-1).tolist()
        torch.testing.assert_close(torch.special.entr(a).sum(-1).tolist(), level["entropy"])
        assert max(level["entropy_unannealed"]) <= math.log(level["parents"]) + 1e-9
    assert tree[0]["entropy"] > tree[0]["entropy_unannealed"] and tree[2]["entropy"] < tree[2]["entropy_unannealed"]
    net.harden()
    assert [level["parent"] for level in net.tree()] == [level["parent"] for level in tree]
    assert all(sum(level["entropy"]) == 0 for level in net.tree())


def test_the_second_stage_keeps_the_tree_alone(tmp_path: Path) -> None:
    net = small()
    before = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        net.stage1[1].running_mean.fill_(3.0)
    parents = [level["parent"] for level in net.tree()]
    assert restart(net) is net and [level["parent"] for level in net.tree()] == parents
    for name, value in net.state_dict().items():
        if name.endswith("alpha"):
            assert torch.equal(value, before[name])
        elif name.endswith("temperature"):
            assert float(value) == 0.0
        elif value.is_floating_point() and value.ndim > 1:
            assert not torch.equal(value, before[name]), name
    assert float(net.stage1[1].running_mean.abs().max()) == 0.0
    net(images()).square().sum().backward()
    assert all(p.grad is None for n, p in net.named_parameters() if n.endswith("alpha"))
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    again = load(small(), tmp_path / "w.safetensors")
    assert torch.equal(again.eval()(images()), net.eval()(images())), "the file says that it is hard"
    with pytest.raises(ValueError, match="only an Explainer has a tree to keep; got Linear"):
        restart(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"a width for each level; got experts=\(2, 3, 4\) and widths=\(4,\)"):
        small(widths=(4,))


def test_two_answers_a_leaf() -> None:
    net = small(answers=2).eval()
    both = net.head.layers(net._mix(net.pool(torch.randn(3, 12, 4, 4)), "head").transpose(0, 1))
    assert both.shape == (5, 3, 2) and net(images(3)).shape == (3, 5)


def test_rates_are_the_code_s() -> None:
    net = small()
    made = adam([{"params": list(net.parameters())}, {"params": [nn.Parameter(torch.zeros(1))]}], net=net)
    assert [g["lr"] for g in made.param_groups] == [0.05, 0.01, 0.05]
    assert sum(p.numel() for p in made.param_groups[1]["params"]) == 3 * 2 + 4 * 3 + 5 * 4
    assert len(adam([{"params": list(restart(net).head.parameters())}], net=net).param_groups) == 1
    epochs = [rate((e - 1) / 300) for e in (1, 2, 3, 300)]
    assert epochs == pytest.approx([0.25, 0.5, 1 - 2 / 309.279, 1 - 299 / 309.279])
    assert [halving(e / 300) for e in (0, 29, 30, 299)] == [1.0, 1.0, 0.5, 0.5**9]


# the method


def lesson_of(student: nn.Module) -> Lesson:
    lesson = Lesson(8, 5)
    lesson.student, lesson.images = student, images(8).double()
    torch.default_generator.manual_seed(1)
    lesson.teacher = Live(nn.Sequential(nn.Flatten(), nn.Linear(256, 5)).double())
    return lesson


def test_the_routing_follows_progress() -> None:
    net, method = small().double(), Method()
    seen = []
    for progress in (0.0, 1 / 300, 2 / 300, 0.1, 1.0):
        lesson_of(net).loss(method, progress)
        seen.append({float(route.temperature) for route in net.routings().values()})
    assert [len(t) for t in seen] == [1] * 5
    assert [t.pop() for t in seen] == pytest.approx([10, 10, 5, 10 / 30, 10 / 300])
    lesson_of(net.harden()).loss(method, 0.5)
    assert all(float(route.temperature) == 0 for route in net.routings().values())


def test_terms_of_the_method() -> None:
    net = small().double().eval()
    _, terms, rows = lesson_of(net).loss(Method(entropy=0.3))
    logp, logq = (rows.teacher / 4).log_softmax(-1), (rows.student / 4).log_softmax(-1)
    torch.testing.assert_close(terms["soft"], 0.9 * 16 * (logp.exp() * (logp - logq)).sum(-1))
    torch.testing.assert_close(
        terms["hard"], 0.1 * nn.functional.cross_entropy(rows.student, rows.target, reduction="none")
    )
    mean = sum(r.attention_entropy() for r in net.routings().values()) / 3
    torch.testing.assert_close(terms["entropy"], (0.3 * mean).expand(8))
    smooth = Method(soft=0.0, hard=1.0, smoothing=0.1)
    assert not smooth.needs_teacher and Method().needs_teacher
    lesson = lesson_of(net)
    lesson.labels[0] = IGNORE_INDEX
    _, terms, rows = lesson.loss(smooth)
    want = nn.functional.cross_entropy(rows.student[1:], rows.target[1:], reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(terms["hard"], torch.cat((torch.zeros(1, dtype=torch.float64), want)))
    assert set(terms) == {"hard"}


def test_the_entropy_term_makes_attention_sparse() -> None:
    torch.default_generator.manual_seed(0)
    net = attend(nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 14), nn.Flatten())).double()
    with torch.no_grad():
        net[2].parametrizations.weight[0].alpha.normal_()
    before, optimizer = entropy(net).item(), torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        lesson_of(net).loss(Method(soft=0.0, hard=0.0, entropy=1.0))[0].backward()
        optimizer.step()
    assert entropy(net).item() < 0.9 * before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"entropy": -1.0}, "Explainer needs entropy >= 0 and finite"),
        ({"smoothing": 1.5}, r"Explainer needs smoothing in \[0, 1\]; got 1.5"),
        ({"end": 0.0}, "Explainer needs 0 < end <= start, both finite; got end=0.0, start=10.0"),
        ({"end": 11.0}, "got end=11.0, start=10.0"),
    ],
)
def test_arguments_that_there_are_not(options: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Method(**options)


def test_a_student_that_attends_nowhere_has_no_entropy() -> None:
    with pytest.raises(ValueError, match=r"this one has none\. Wrap it: models\.attention\.attend"):
        Lesson().loss(Method(entropy=0.1))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_runs_of_both_kinds_of_student(precision: str, tmp_path: Path) -> None:
    x, y = images(32), torch.arange(32) % 5
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(256, 5))
    batches = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 32, 8)]
    for i, student in enumerate((small(), build("vam2:resnet8", classes=5, channels=1))):
        student.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        method, how = Method(entropy=0.01), {"precision": precision, "quiet": True, "selfcheck": False, "accumulate": 2}
        run = distill(student, teacher, batches, method=method, steps=4, out=tmp_path / str(i), **how)
        assert run.facts["method"]["entropy"] == 0.01 and all(p.isfinite().all() for p in run.student.parameters())
        fresh = small() if i == 0 else build("vam2:resnet8", classes=5, channels=1)
        load(fresh, tmp_path / str(i) / "student.safetensors")
        torch.testing.assert_close(fresh.eval()(x), run.student.eval()(x))  # laid out otherwise


# attention over virtual blocks


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet8", {}),
        ("wrn_16_1", {"blocks": 3}),
        ("vgg8", {"blocks": 8, "share": 4}),
        ("MobileNetV2", {"temperature": 0.5}),
        ("ShuffleV2", {"blocks": 2}),
    ],
)
def test_answers_are_what_they_were_and_folding_changes_nothing(name: str, options: dict[str, Any]) -> None:
    plain = build(name, classes=4).double().eval()
    net, x = copy.deepcopy(plain), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert attend(net, **options) is net
    torch.testing.assert_close(net(x), plain(x), rtol=1e-12, atol=1e-12)
    assert entropy(net).item() == pytest.approx(math.log(options.get("blocks", 4)), abs=1e-12)
    made = [m for m in net.modules() if hasattr(m, "attends")]
    assert len(made) == len(entropies(net)) and not any(m.alpha.any() for m in made)
    with torch.no_grad():
        for m in made:
            m.alpha.normal_()
    unfolded = net(x)
    assert (unfolded - plain(x)).abs().max() > 1e-8  # fresh statistics leave some nets nearly silent
    unfolded.square().sum().backward()
    assert all(m.alpha.grad is not None and m.alpha.grad.any() for m in made)
    assert merge_attention(net) is net and not entropies(net)
    torch.testing.assert_close(net(x), unfolded, rtol=1e-12, atol=1e-12)
    assert set(net.state_dict()) == set(plain.state_dict())
    plain.load_state_dict(net.state_dict())


def test_the_sum_over_blocks_is_the_convolution_s() -> None:
    torch.default_generator.manual_seed(0)
    conv = nn.Conv2d(7, 6, 3, stride=2, padding=1).double()
    x, weight = torch.randn(2, 7, 5, 5, dtype=torch.float64), conv.weight.detach().clone()
    attend(conv, blocks=3, temperature=0.7, share=2, skip=())
    part = conv.parametrizations.weight[0]
    with torch.no_grad():
        part.alpha.normal_()
    A, want = (part.alpha / 0.7).softmax(-1), conv.bias.detach()[:, None, None].expand(2, 6, 3, 3).clone()
    assert A.shape == (3, 3)
    for m, block in enumerate(([0, 1, 2], [3, 4], [5, 6])):
        y = nn.functional.conv2d(x[:, block], weight[:, block], stride=2, padding=1)
        want += 3 * A[torch.arange(6) // 2, m][:, None, None] * y
    torch.testing.assert_close(conv(x), want)


@pytest.mark.parametrize("net", [nn.Conv1d(8, 8, 3), nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))], ids=repr)
@pytest.mark.parametrize("which", ["copy", "original"])
def test_merging_a_deep_copy_leaves_the_other_as_it_is(net: nn.Module, which: str) -> None:
    original = attend(copy.deepcopy(net), blocks=2, skip=())
    with torch.no_grad():
        for module in original.modules():
            if hasattr(module, "attends"):
                module.alpha.normal_()
    twin, x = copy.deepcopy(original), torch.randn(2, 8, 6) if isinstance(net, nn.Conv1d) else torch.randn(2, 8, 6, 6)
    want = original(x)
    merged, other = (twin, original) if which == "copy" else (original, twin)
    merge_attention(merged)
    assert not entropies(merged) and entropies(other)
    for model in (merged, other, copy.deepcopy(other), merge_attention(other)):
        torch.testing.assert_close(model(x), want)


def test_what_attends_and_what_does_not() -> None:
    net = build("MobileNetV2", classes=4)
    names = entropies(attend(net))
    convs = {n: m for n, m in net.named_modules() if isinstance(m, nn.Conv2d)}
    assert set(convs) - set(names) == {"stem.0", *(n for n, m in convs.items() if m.groups > 1)}
    some = entropies(attend(build("resnet8", classes=4), skip=("stem", "stage3", "stage1.0.residual.0")))
    assert set(some) == {"stage1.0.residual.3", "stage2.0.residual.0", "stage2.0.residual.3", "stage2.0.shortcut.0"}
    assert len(entropies(build("VAM8:resnet8", classes=4))) == 8
    assert entropy(build("vam8:resnet8", classes=4)).item() == pytest.approx(math.log(8), abs=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"blocks": 1}, "blocks >= 2, share >= 1 and a temperature > 0; got blocks=1"),
        ({"temperature": 0.0}, "temperature=0"),
        ({"skip": ("stege1",)}, "no module 'stege1' to skip. Did you mean 'stage1'"),
        ({"blocks": 65}, r"ResNet8? ?has no dense|has no dense convolution of 65 or more input maps"),
    ],
)
def test_what_cannot_attend_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        attend(build("resnet8", classes=4), **options)


def test_nothing_attends_twice_or_where_there_is_nothing() -> None:
    net = build("vam:resnet8", classes=4)
    with pytest.raises(ValueError, match=r"has attention already; call merge_attention"):
        attend(net)
    with pytest.raises(ValueError, match="Linear has no attention"):
        entropy(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Explainer has no dense convolution"):
        build("vam:explainer_small", classes=4)
    with pytest.raises(ValueError, match="Did you mean 'resnet8'"):
        build("vam:resnet9", classes=4)


def test_a_teacher_that_attends_is_folded_and_asked_in_half_precision() -> None:
    net = build("vam:resnet8", classes=4).eval()
    with torch.no_grad():
        for m in net.modules():
            if hasattr(m, "attends"):
                m.alpha.normal_()
    x = torch.randn(2, 3, 32, 32)
    want = net(x)
    torch.testing.assert_close(Live(net, fuse_conv_bn=True, channels_last=True)(x), want.detach(), rtol=1e-4, atol=1e-5)
    assert Live(net, precision="bf16")(x).sub(want.detach()).abs().max() < 0.1 * want.abs().max()


# what several explainers attend to


def test_groupings_are_compared() -> None:
    a = [0, 0, 1, 1, 2, 2]
    assert adjusted_rand(a, [5, 5, 3, 3, 9, 9]) == 1.0 and adjusted_rand([0] * 6, [1] * 6) == 1.0
    assert adjusted_rand(a, [0, 1, 0, 1, 0, 1]) == pytest.approx((0 - 3 * 6 / 15) / ((3 + 6) / 2 - 3 * 6 / 15))


def planted(parents: list[int], sharp: float) -> Explainer:
    """A small net whose classes hang on these experts."""
    net = small()
    with torch.no_grad():
        net.routings()["head"].alpha.copy_(sharp * torch.eye(4)[parents])
        for name in ("stage2", "stage3"):
            net.routings()[name].alpha.copy_(torch.eye(*net.routings()[name].alpha.shape))
    return net


def test_what_labels_and_teachers_do_to_the_tree(tmp_path: Path) -> None:
    nets = {"hard labels": planted([0, 0, 1, 1, 2], 0.2), "KD": planted([3, 3, 2, 2, 2], 2.0)}
    names = ["ant", "bee", "cow", "dog", "<elk>"]
    found = json.loads(json.dumps(compared(nets, class_names=names)))
    assert found["entropy"]["KD"]["classes"] < found["entropy"]["hard labels"]["classes"] < found["most"]["classes"]
    assert found["branches"]["KD"]["stage3"] == {"2": ["cow", "dog", "<elk>"], "3": ["ant", "bee"]}
    assert branches(found["tree"]["hard labels"]) == {
        "stage3": [0, 0, 1, 1, 2],
        "stage2": [0, 0, 1, 1, 2],
        "stage1": [0, 0, 1, 1, 0],
    }
    assert found["alike"]["stage3"]["hard labels | KD"] == pytest.approx(
        adjusted_rand([0, 0, 1, 1, 2], [1, 1, 0, 0, 0])
    )
    paths = write_figures(found, tmp_path / "figures", names=names)
    assert [p.name for p in paths] == ["routing.svg", "routing-unannealed.svg", "tree-hard-labels.svg", "tree-kd.svg"]
    for path in paths:
        root = ElementTree.fromstring(path.read_text())
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and not re.search(r"\bnan\b", path.read_text())
    drawn = paths[-1].read_text()
    assert "&lt;elk&gt;" in drawn and "5 classes on 2 of 4 last experts." in drawn
    wide = {"KD": nets["KD"], "other": small(6)}
    for wrong, said in ((wide, "trees of the same sizes"), ({"a": nn.Linear(1, 1)}, r"a \(Linear\)"), ({}, "got none")):
        with pytest.raises(ValueError, match=said):
            compared(wrong)


def test_the_audit_asks_for_the_tree_and_the_report_draws_it(tmp_path: Path) -> None:
    student = planted([0, 0, 1, 1, 1], 1.0)
    x, y = images(40), torch.arange(40) % 5

    class Teacher(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            """Takes 0 for 1 and 1 for 0, and 2, 3 and 4 for each other."""
            z = 3.0 * torch.tensor([[3.0, 2, 0, 0, 0], [2, 3, 0, 0, 0], *([[0.0, 0, 2, 2, 2]] * 3)])
            return z[torch.arange(len(x)) % 5] + 0 * x.flatten(1).mean(1, keepdim=True)

    audit = Explanation(class_names=["ant", "bee", "cow", "dog", "elk"])
    rows = by_name(audit(student, Teacher(), [(x, y)]))
    assert rows["student", "experts_used"].value == 2
    assert rows["student", "routing_entropy_classes"].value == pytest.approx(sum(student.tree()[-1]["entropy"]) / 5)
    share = rows["both", "branch_share"]
    assert (
        share.value is not None
        and share.value > 0.98
        and share.share
        and "By chance it would be 0.400" in share.meaning
    )
    plain = nn.Sequential(nn.Flatten(), nn.Linear(256, 5))
    assert not any("routing" in n for _, n in by_name(audit(plain, Teacher(), [(x, y)])))
    assert "tree" not in audit.report_data(plain)
    run = make_run(tmp_path / "run", "KD", 0)
    made = {"findings": [f.record() for f in rows.values()], "drawn": audit.report_data(student)}
    (run / "audits.json").write_text(json.dumps({"format": 1, "audits": {"explanation": made}}))
    html = render([load_run(run)])
    assert "KDExplainer&#39;s concept tree" in html and ">elk</text>" in html and "branch share" in html
    made["drawn"]["tree"][-1]["parent"][0] = 9
    assert not is_complete(made["drawn"]["tree"])
    (run / "audits.json").write_text(json.dumps({"format": 1, "audits": {"explanation": made}}))
    assert ">elk</text>" not in render([load_run(run)]), "a tree that does not fit is not drawn"
    assert tree_figure("t", student.tree()).count("<circle") == 1 + 2 + 2 + 2 + 5


# the recipe


def test_the_recipe_s_students_records_and_rates() -> None:
    assert network_facts("VAM8:resnet8") == {"name": "resnet8", "attention": "vam8"}
    assert network_facts("timm:resnet18") == {"name": "timm:resnet18"}
    assert run_label(preset_from("kd"), "vam:resnet8") == "KD + VAM"
    assert run_label(preset_from("kd"), "explainer_small", second_stage=True) == "KD, second stage"
    assert [cifar_lr(n) for n in ("vam:MobileNetV2", "vam:vgg8", "ShuffleV1")] == [0.01, 0.05, 0.01]
    net = small()
    others = cifar_sgd(0.05), cifar_decay
    optimizer, schedule = optimizer_and_schedule(net, 0.05, others)
    made = optimizer([{"params": list(net.parameters())}])
    assert isinstance(made, torch.optim.Adam) and len(made.param_groups) == 2 and schedule is rate
    optimizer, schedule = optimizer_and_schedule(restart(net), 0.05, others)
    assert isinstance(optimizer([{"params": list(net.parameters())}]), torch.optim.SGD) and schedule is halving
    assert optimizer_and_schedule(build("vam:resnet8", classes=3), 0.05, others)[1](0.7) == pytest.approx(0.1)
