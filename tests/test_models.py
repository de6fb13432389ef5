"""The zoo: the field's sizes and shapes, determinism, what cannot be built; nets of other libraries where installed."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tempering.data import cifar100
from tempering.models import MODELS, build, load, load_checkpoint
from tempering.models.external_weights import literature_names
from tempering.utils.hooks import FeatureExtractor
from tests.cases import each
from tests.paths import SHARED, needs_shared

# parameters at 100 classes, as the field's implementation has them; the shapes are in the golden file
PARAMETERS = {
    "resnet8": 83_892,
    "resnet20": 278_324,
    "resnet56": 861_620,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "wrn_16_2": 703_284,
    "wrn_40_2": 2_255_156,
    "vgg8": 3_965_028,
    "vgg13": 9_462_180,
    "MobileNetV2": 812_836,
    "ShuffleV1": 949_258,
    "ShuffleV2": 1_355_528,
    "ResNet50": 23_705_252,
}
SMALL = ("resnet8", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2", "ResNet18")


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name: str) -> None:
    assert count(build(name, classes=100)) == PARAMETERS[name]


@needs_shared
def test_every_net_has_the_golden_parameters_and_stages() -> None:
    golden = json.loads((SHARED / "golden" / "models.json").read_text())["models"]
    for name, facts in golden.items():
        net = build(name, classes=100).eval()
        assert count(net) == facts["parameters"], name
        stages = ["stem", *net.stages]
        with FeatureExtractor(net, [*stages, "pool"]) as taps, torch.no_grad():
            net(torch.zeros(1, 3, 32, 32))
            assert [list(taps[s].shape[1:]) for s in stages] == facts["stage_shapes"], name
            assert taps["pool"].shape[1] == facts["pooled_feature"], name


@pytest.mark.parametrize("name", SMALL)
def test_forward_and_backward(name: str) -> None:
    net = build(name, classes=7, channels=1)
    logits = net(torch.randn(2, 1, 32, 32))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


def test_digits_nets_read_8_by_8() -> None:
    for name in ("digits_large", "digits_small"):
        assert build(name, classes=10, channels=1)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_weights_follow_the_seed() -> None:
    def first(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return next(build("resnet8", classes=10).parameters()).detach()

    assert torch.equal(first(1), first(1)) and not torch.equal(first(1), first(2))


def test_convolutions_start_at_he_fan_out() -> None:
    weight = build("resnet32x4", classes=10).stage3[1].residual[0].weight
    assert float(weight.detach().std()) == pytest.approx((2 / (9 * weight.shape[0])) ** 0.5, rel=0.02)


def test_letter_case_does_not_matter() -> None:
    assert count(build("mobilenetv2", classes=100)) == PARAMETERS["MobileNetV2"]
    assert len({name.lower() for name in MODELS}) == len(MODELS)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("resnet8x5", {}, "Did you mean 'resnet8x4'?"),
        ("hub:resnet18", {}, "timm:NAME, torchvision:NAME, transformers:NAME"),
        ("resnet8", {"pretrained": True}, "the zoo has no weights of 'resnet8'"),
    ],
)
def test_names_that_there_are_not(name: str, options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=r".*") as caught:
        build(name, classes=10, **options)
    assert said in str(caught.value)


def test_sizes_that_there_are_not() -> None:
    with pytest.raises(ValueError, match="classes=0"):
        build("resnet8", classes=0)


# weights


def test_load_brings_back_every_weight(tmp_path) -> None:
    net, other = build("wrn_16_1", classes=10), build("wrn_16_1", classes=10)
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    load(other, tmp_path / "w.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True))


def test_load_names_what_differs(tmp_path) -> None:
    save_file(build("resnet8", classes=10).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"head\.bias is \(10,\) and should be \(100,\)"):
        load(build("resnet8", classes=100), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"stage1\.1\..* is missing"):
        load(build("resnet14", classes=10), tmp_path / "w.safetensors")


@pytest.mark.parametrize("name", ["resnet8", "digits_small"])
def test_load_refuses_integers_for_floats_and_nan(name: str, tmp_path) -> None:
    net = build(name, classes=10)
    state, before = net.state_dict(), copy.deepcopy(net.state_dict())
    float_name = next(n for n, v in state.items() if v.is_floating_point())
    spoiled = {
        "int32": ({float_name: state[float_name].int()}, "is torch.int32 and should be torch.float32"),
        "nan": ({float_name: torch.full_like(state[float_name], float("nan"))}, "has values that are NaN"),
    }
    if counter := next((n for n, v in state.items() if not v.is_floating_point()), None):
        spoiled["float"] = ({counter: state[counter].float()}, "is torch.float32 and should be torch.int64")
    spoiled["half"] = ({n: v.half() for n, v in state.items() if v.is_floating_point()}, None)
    for key, (more, said) in spoiled.items():
        path = tmp_path / f"{key}.safetensors"
        save_file(state | more, path)
        if said is None:
            load(net, path)
            continue
        with pytest.raises(ValueError, match=said):
            load(net, path)
        assert all(torch.equal(v, before[n]) for n, v in net.state_dict().items()), "nothing is loaded"


# name in the nets of RepDistiller and mdistiller -> name in the zoo's
LITERATURE = {
    "resnet8": {
        "conv1.weight": "stem.0.weight",
        "bn1.running_var": "stem.1.running_var",
        "layer1.0.conv2.weight": "stage1.0.residual.3.weight",
        "layer3.0.downsample.1.bias": "stage3.0.shortcut.1.bias",
        "fc.bias": "head.bias",
    },
    "ResNet18": {"layer4.1.bn2.weight": "stage4.1.residual.4.weight", "layer2.0.shortcut.0.weight": None},
    "wrn_16_2": {
        "conv1.weight": "stem.weight",
        "block1.layer.0.bn1.weight": "stage1.0.before.0.weight",
        "block2.layer.0.convShortcut.weight": "stage2.0.shortcut.weight",
        "block3.layer.1.conv2.weight": "stage3.1.residual.3.weight",
        "bn1.weight": "pool.0.weight",
    },
    "vgg8": {
        "block0.0.bias": "stem.0.bias",
        "block1.1.weight": "stage1.2.weight",
        "block4.0.weight": "stage4.0.weight",
    },
    "MobileNetV2": {
        "conv1.0.weight": "stem.0.weight",
        "blocks.1.0.conv.7.bias": "stage1.1.residual.7.bias",
        "blocks.4.2.conv.3.weight": "stage3.6.residual.3.weight",
        "conv2.1.weight": "pool.1.weight",
        "classifier.0.weight": "head.weight",
    },
    "ShuffleV1": {"layer2.3.conv3.weight": "stage2.3.residual.7.weight", "linear.weight": "head.weight"},
    "ShuffleV2": {"layer1.0.bn5.weight": "stage1.0.right.6.weight", "bn2.weight": "pool.1.weight"},
}


@each("name", LITERATURE, ids=str)
def test_nets_are_read_by_their_names_in_the_literature(name: str, tmp_path: Path) -> None:
    net, other = build(name, classes=10), build(name, classes=10)
    state, names = net.state_dict(), literature_names(net)
    table = {theirs: own or theirs.replace("layer", "stage") for theirs, own in LITERATURE[name].items()}
    theirs: dict[str, str] = {own: own for own in state}
    for own in state:
        module, _, leaf = own.rpartition(".")
        spelled = [f"{candidate}.{leaf}" for candidate in names[module]]
        theirs[own] = next((s for s in spelled if s in table), spelled[-1] if name == "MobileNetV2" else spelled[0])
    assert {file: own for own, file in theirs.items() if file in table} == table
    weights = {f"module.{theirs[own]}": value for own, value in state.items() if "tracked" not in own}
    scores = {"best_acc": np.float64(70.0), "args": argparse.Namespace(lr=0.1), "epoch": 3}
    torch.save({"model": weights, "optimizer": {}, **scores}, tmp_path / "w.pth")
    loaded = load_checkpoint(other, tmp_path / "w.pth")
    assert all(torch.equal(state[own], value) for own, value in other.state_dict().items() if "tracked" not in own)
    assert f"{len(weights)} tensors under 'model', without 'module.'; {len(weights)} renamed, such as " in loaded.line


def test_files_of_trainers_are_read_and_say_where_the_weights_were(tmp_path: Path) -> None:
    names = ["resnet8"]
    if importlib.util.find_spec("timm") is not None:
        names.append("timm:resnet18")
    if importlib.util.find_spec("torchvision") is not None:
        names.append("torchvision:resnet18")
    args, path = argparse.Namespace(lr=0.1), tmp_path / "w.pth.tar"
    for name in names:
        state, other = build(name, classes=10).state_dict(), build(name, classes=10).state_dict()
        timm = {"epoch": 1, "arch": "x", "state_dict": other, "state_dict_ema": state, "args": args, "metric": 7.5}
        torchvision = {"model": state, "optimizer": {"param_groups": [{"lr": 0.1}]}, "epoch": 1, "args": args}
        imagenet = {
            "arch": "x",
            "state_dict": {f"module.{key}": value for key, value in state.items()},
            "best_acc1": torch.ones(()),
        }
        for content, said in (
            (state, ""),
            (timm, " under 'state_dict_ema'"),
            (torchvision, " under 'model'"),
            (imagenet, " under 'state_dict', without 'module.'"),
        ):
            torch.save(content, path)
            net = build(name, classes=10)
            line = load_checkpoint(net, path).line
            assert line == f"weights from {path}: {len(state)} tensors{said}", name
            assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), state.values(), strict=True))


@each(
    ("content", "said"),
    [
        ({"state_dict": {"fc.weight": torch.zeros(3, 64)}}, "fc.weight (head.weight in the net) is (3, 64)"),
        ({"conv9.weight": torch.zeros(1)}, "head.bias is missing; head.weight is missing; conv9.weight is not in the"),
        ({"epoch": 3, "weights": {}}, "holds the keys epoch, weights, and weights are expected there or under one of"),
        (torch.nn.Linear(2, 2), "is not a file of weights that torch.load(weights_only=True) reads"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_checkpoints_that_do_not_fit_are_refused_by_name(content: object, said: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError) as caught:
        load(build("resnet8", classes=10), tmp_path / "w.pth")
    assert said in str(caught.value)


def test_load_reads_no_half_file(tmp_path: Path) -> None:
    save_file(build("resnet8", classes=10).state_dict(), tmp_path / "w.safetensors")
    whole = (tmp_path / "w.safetensors").read_bytes()
    for name, said in (("w.safetensors", "not a valid safetensors file"), ("w.pth", "is not a file of weights")):
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=said):
            load(build("resnet8", classes=10), tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"student\.safetensors"):
        load(build("resnet8", classes=10), tmp_path / "none.safetensors")


@needs_shared
def test_a_resnet14_of_the_literature_is_as_accurate_as_it_is_said() -> None:
    pytest.importorskip("PIL")
    net = load(build("resnet14", classes=100), SHARED / "models" / "resnet14_cifar100.safetensors").eval()
    test = cifar100(SHARED / "data" / "cifar100", subset=100, test_subset=1000).test
    with torch.no_grad():
        right = sum(int((net(images).argmax(1) == labels).sum()) for images, labels, *_ in test)
    assert 640 <= right <= 690  # 65.46 % of all 10,000


# other libraries


def test_transformers_net_answers_logits() -> None:
    pytest.importorskip("transformers")
    from transformers import ViTConfig, ViTForImageClassification

    from tempering.models.external import Logits

    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    inner = ViTForImageClassification(ViTConfig(image_size=32, patch_size=16, num_labels=5, **small))
    assert Logits(inner)(torch.zeros(2, 3, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize(("library", "name"), [("timm", "resnet18"), ("torchvision", "resnet18")])
def test_nets_of_other_libraries(library: str, name: str) -> None:
    try:
        net = build(f"{library}:{name}", classes=5)
    except ImportError as error:
        assert 'pip install "tempering[models]"' in str(error)
        pytest.skip(f"{library} does not import here: {error.__cause__}")
    assert net.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    with pytest.raises(ValueError, match=f"{library} has no"):
        build(f"{library}:resnet18000", classes=5)


# taps


def test_taps_keep_the_last_forward_and_its_gradient() -> None:
    net = build("resnet8", classes=10)
    with FeatureExtractor(net, ["stage2", "pool", "stage2"]) as taps:
        net(torch.randn(1, 3, 32, 32))
        net(torch.randn(2, 3, 32, 32))
        assert taps["stage2"].shape == (2, 32, 16, 16) and taps["pool"].shape == (2, 64)
        taps["pool"].sum().backward()
    assert net.stem[0].weight.grad is not None
    with pytest.raises(KeyError, match="the context was exited"):
        taps["stage2"]


def test_taps_leave_the_model_as_it_was() -> None:
    net = build("resnet8", classes=10)
    with FeatureExtractor(net, ["stage1"]):
        assert net.stage1._forward_hooks
    assert not net.stage1._forward_hooks


def test_taps_take_the_first_tensor_of_a_tuple() -> None:
    class Pair(nn.Module):
        def forward(self, x):
            return (x + 1, None)

    net = nn.Sequential(Pair())
    with FeatureExtractor(net, ["0"]) as taps:
        net(torch.zeros(2))
        assert torch.equal(taps["0"], torch.ones(2))


def test_a_tap_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"ResNet|Staged has no module 'stage9'. Did you mean 'stage\d'"):
        FeatureExtractor(build("resnet8", classes=10), ["stage9"])
    with (
        FeatureExtractor(build("resnet8", classes=10), ["stage1"]) as taps,
        pytest.raises(KeyError, match="is not extracted"),
    ):
        taps["stage2"]
