"""The zoo: the field's sizes and shapes, determinism, what cannot be built; nets of other libraries where installed."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tempering.models import MODELS, build, load
from tempering.utils.hooks import FeatureExtractor
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


def test_load_reads_no_pickle_and_no_half_file(tmp_path) -> None:
    torch.save(build("resnet8", classes=10).state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="is a pickle, which is not loaded"):
        load(build("resnet8", classes=10), tmp_path / "w.pth")
    save_file(build("resnet8", classes=10).state_dict(), tmp_path / "w.safetensors")
    whole = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a valid safetensors file"):
        load(build("resnet8", classes=10), tmp_path / "w.safetensors")
    with pytest.raises(FileNotFoundError, match=r"student\.safetensors"):
        load(build("resnet8", classes=10), tmp_path / "none.safetensors")


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
