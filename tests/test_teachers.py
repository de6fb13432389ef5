"""Teachers: live ones stay frozen and in eval; cached ones answer as the live one did, or refuse."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tempering import distill
from tempering.data import Batches
from tempering.methods.logits.kd import KD
from tempering.teachers import Cached, Live, Teacher, fingerprint, record
from tempering.teachers.cache import recorder as recording
from tempering.teachers.cache.base import CorruptCacheError
from tests.paths import ROOT


class Block(nn.Module):
    """A residual block with everything that depends on the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = (x + self.bn2(self.conv2(x))).relu()
        return self.head(self.drop(x.mean((2, 3))))


def net() -> Block:
    """Seeded, with running statistics that are not the initial ones."""
    torch.manual_seed(11)
    model = Block()
    for _ in range(3):
        model(torch.randn(16, 3, 6, 6) * 2 + 1)
    return model


def data(n: int = 40, *, batch_size: int = 8, pixels_seed: int = 0, **more: Any) -> Batches:
    generator = torch.Generator().manual_seed(pixels_seed)
    images = torch.randint(256, (n, 3, 6, 6), generator=generator, dtype=torch.uint8)
    return Batches(images, torch.arange(n) % 5, batch_size=batch_size, mean=(0.5,) * 3, std=(0.25,) * 3, **more)


def augmented(**more: Any) -> Batches:
    return data(crop=1, flip=True, shuffle=True, **more)


# live


def test_a_live_teacher_is_frozen_in_eval_and_gives_no_graph() -> None:
    model, x = net(), torch.randn(4, 3, 6, 6)
    assert model.training
    expected = copy.deepcopy(model).eval()(x)
    statistics = model.bn1.running_mean.clone()
    teacher = Live(model)
    assert isinstance(teacher, Teacher) and not isinstance(teacher, nn.Module)
    assert teacher.model is model and not model.training
    assert not any(p.requires_grad for p in model.parameters())
    said = teacher(x, None)
    assert not said.requires_grad and said.grad_fn is None
    assert torch.equal(said, expected)
    assert torch.equal(model.bn1.running_mean, statistics)
    student = nn.Linear(5, 5)
    student(said).sum().backward()  # a student can learn from it
    assert student.weight.grad is not None


def test_a_teacher_put_in_training_mode_goes_back_and_says_so_once() -> None:
    model, x = net(), torch.randn(4, 3, 6, 6)
    teacher = Live(model)
    expected = teacher(x)
    model.train()
    with pytest.warns(UserWarning, match="the teacher Block was in training mode"):
        assert torch.equal(teacher(x), expected)
    assert not any(m.training for m in model.modules())
    model.drop.train()  # one layer is enough
    assert torch.equal(teacher(x), expected)  # warnings are errors: a second one would fail here


def test_folded_batch_norm_answers_the_same_and_leaves_the_model_alone() -> None:
    model, x = net().double(), torch.randn(4, 3, 6, 6, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    plain, folded = Live(copy.deepcopy(model))(x), Live(model, fuse_conv_bn=True)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.model.modules())
    assert type(folded.model).__name__ == "Block"
    assert (folded(x) - plain).abs().max() < 1e-12
    single = net()
    got = Live(single, fuse_conv_bn=True)(x.float())
    assert (got - Live(single)(x.float())).abs().max() < 1e-5
    assert model.training and model.conv1.weight.requires_grad
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    folded.model.train()
    with pytest.warns(UserWarning, match="in training mode"):
        folded(x)


class Hard(nn.Module):
    """One convolution called twice, one heard by two, one with a norm of its batch: none may be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.bn1, self.bn2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.heard, self.bn3 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.own, self.bn4 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)
        self.last, self.bn5 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn2(self.twice(self.bn1(self.twice(x))))
        heard = self.heard(x)
        x = self.bn4(self.own(heard + self.bn3(heard)))
        return self.bn5(self.last(x)).mean((2, 3))


def test_only_what_may_be_folded_is() -> None:
    torch.manual_seed(0)
    model, x = Hard(), torch.randn(8, 3, 5, 5)
    for _ in range(3):
        model(x * 2 + 1)
    folded = Live(model, fuse_conv_bn=True)
    assert (folded(x) - Live(model)(x)).abs().max() < 1e-5
    kept = {name for name, m in folded.model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert kept == {"bn1", "bn2", "bn3", "bn4"}


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_what_cannot_be_folded_or_is_no_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"torch.fx cannot trace Branching.* Leave out fuse_conv_bn=True"):
        Live(Branching(), fuse_conv_bn=True)
    with pytest.raises(ValueError, match="precision 'bf16', 'fp16', 'fp32' or None; got 'half'"):
        Live(net(), precision="half")
    with pytest.raises(TypeError, match="Live needs a torch module; got function"):
        Live(lambda x: x)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("fold", [False, True])
def test_bf16_is_a_copy_that_answers_in_float32(fold: bool) -> None:
    model, x = net(), torch.randn(16, 3, 6, 6)
    expected = Live(copy.deepcopy(model))(x)
    teacher = Live(model, precision="bf16", fuse_conv_bn=fold)
    said = teacher(x)
    assert said.dtype == torch.float32
    assert 0 < (said - expected).abs().max() < 0.05 * expected.abs().max()
    assert teacher.model is not model
    assert {p.dtype for p in teacher.model.parameters()} == {torch.bfloat16}
    assert teacher.model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert model.conv1.weight.dtype == torch.float32 and model.training
    assert Live(model.double(), precision="fp32")(x.double()).dtype == torch.float32


def test_channels_last_changes_the_layout_and_not_the_values() -> None:
    model, x = net(), torch.randn(4, 3, 6, 6)
    expected = Live(copy.deepcopy(model))(x)
    seen = []
    teacher = Live(model, channels_last=True)
    model.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    assert (teacher(x) - expected).abs().max() < 1e-6
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


def test_compile_compiles_the_forward(monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, mode: lambda x: model(x) + 1)
    model, x = net(), torch.randn(4, 3, 6, 6)
    assert torch.equal(Live(model, compile=True)(x), Live(model)(x) + 1)


def test_a_device_of_its_own() -> None:
    """The meta device stands in for a second one: it holds no numbers, and shows where everything went."""
    model, seen = net(), []
    teacher = Live(model, device="meta").to("cpu")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    model.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].device.type))
    with pytest.raises(NotImplementedError, match="meta"):
        teacher(torch.randn(4, 3, 6, 6))  # its answers cannot come back
    assert seen == ["meta"]
    alone, x = Live(net(), device="cpu"), torch.randn(4, 3, 6, 6)
    model = net()
    model.load_state_dict(alone.model.state_dict())
    assert torch.equal(alone(x), Live(model)(x))


def test_nested_inputs_and_outputs_keep_their_form() -> None:
    transformers = pytest.importorskip("transformers", reason="for an output class that is a mapping with attributes")
    from transformers.modeling_outputs import SequenceClassifierOutput

    del transformers

    class Wraps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 2)

        def forward(self, inputs: dict[str, Tensor]) -> Any:
            z = self.inner(inputs["x"])
            return SequenceClassifierOutput(logits=z, hidden_states=(z, inputs["ids"]))

    x, ids = torch.randn(4, 3), torch.arange(4)
    said = Live(Wraps(), precision="bf16")({"x": x, "ids": ids})
    assert said.logits.dtype == said["logits"].dtype == torch.float32
    assert said.hidden_states[0].dtype == torch.float32 and torch.equal(said.hidden_states[1], ids)
    assert x.dtype == torch.float32


def test_fingerprint_is_of_weights_names_and_types_wherever_they_lie() -> None:
    base = fingerprint(net())
    assert len(base) == 64 and base == fingerprint(net())
    assert fingerprint(net().to(memory_format=torch.channels_last).eval().requires_grad_(False)) == base
    nudged = net()
    with torch.no_grad():
        nudged.head.bias[2] += 1e-6
    moved = net()
    moved.bn1.running_var.mul_(1.5)
    renamed = nn.Sequential(net())
    assert len({base, *map(fingerprint, (nudged, moved, renamed, net().bfloat16()))}) == 5
    assert fingerprint(nn.Sequential(nn.ReLU())) != fingerprint(nn.Sequential(nn.GELU()))


def test_identity_is_of_the_weights_as_they_came_with_precision_and_fold() -> None:
    made = [
        Live(net(), **options) for options in ({}, {"fuse_conv_bn": True}, {"precision": "bf16"}, {"precision": "fp32"})
    ]
    assert len({teacher.identity for teacher in made}) == 4
    assert Live(net(), channels_last=True).identity == made[0].identity
    assert Live(net(), fuse_conv_bn=True).identity == made[1].identity


# cached: what it answers


@pytest.mark.parametrize("precision, close", [("fp32", 1e-5), ("fp16", 1e-3), ("bf16", 8e-3)])
def test_clean_answers_are_those_of_the_live_teacher(precision: str, close: float, tmp_path: Path) -> None:
    live, batches = Live(net()), data(43, shuffle=True)
    cached = record(live, batches, tmp_path / "cache", precision=precision, quiet=True)
    assert (cached.rows, cached.classes) == (43, 5)
    for x, _, ids in batches:
        expected, got = live(x), cached(x, ids)
        assert got.dtype == torch.float32 and not got.requires_grad
        assert (got - expected).abs().max() <= close * expected.abs().max()
    cached.verify(live, batches, rows=43)
    half = Live(net(), precision="bf16")
    record(half, batches, tmp_path / "half", precision=precision, quiet=True).verify(half, batches, rows=200)
    assert cached.model is None and cached.to("cpu") is cached


def test_recorded_views_answer_for_what_the_student_sees(tmp_path: Path) -> None:
    live, batches = Live(net()), augmented()
    cached = record(live, batches, tmp_path / "cache", views=3, precision="fp32", quiet=True)
    assert cached.rows == 120
    replayed, differ = batches.replay(3), 0.0
    for epoch in range(4):
        replayed.set_epoch(epoch)
        for x, _, ids in replayed:
            assert (cached(x, ids) - live(x)).abs().max() < 1e-5
            differ = max(differ, float((cached(x, ids % 40) - live(x)).abs().max()))
    assert differ > 0.1  # the test would notice the wrong view
    cached.verify(live, batches, rows=120)


def test_clean_targets_for_augmented_batches_are_a_choice_that_is_made_aloud(tmp_path: Path) -> None:
    live, batches = Live(net()), augmented()
    cached = record(live, batches, tmp_path / "cache", precision="fp32", quiet=True)
    batches.set_epoch(5)
    x, _, ids = next(iter(batches))
    clean_x = batches.clean().gather(ids)[0]
    assert (cached(x, ids) - live(clean_x)).abs().max() < 1e-5
    cached.verify(live, batches)
    with pytest.raises(ValueError) as caught:
        Cached(tmp_path / "cache", batches=batches)
    for part in ("outputs for clean images, and data are augmented: crop=1, flip=True", "clean=True", "views=8"):
        assert part in str(caught.value)
    Cached(tmp_path / "cache", batches=batches, clean=True)
    Cached(tmp_path / "cache", batches=batches.clean(), teacher=live)


def test_ids_are_needed_and_must_be_there(tmp_path: Path) -> None:
    cached = record(Live(net()), data(), tmp_path / "cache", quiet=True)
    x = torch.zeros(2, 3, 6, 6)
    with pytest.raises(ValueError, match=r"Yield \(x, y, id\)"):
        cached(x, None)
    for wrong in (40, -1):
        with pytest.raises(ValueError, match=r"has rows 0 to 39, and the batch has ids"):
            cached(x, torch.tensor([3, wrong]))


def test_a_second_recording_of_the_same_is_not_made(tmp_path: Path) -> None:
    live, batches = Live(net()), data(200)
    first = record(live, batches, tmp_path / "cache", quiet=True)
    counting = Told(live)
    again = record(counting, batches, tmp_path / "cache", quiet=True)
    assert again.identity == first.identity
    assert 0 < counting.asked <= 32, "a sample is compared, and no more is asked"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache"]
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["key.json", "logits.npy"]


# cached: what it refuses


class Told(Teacher):
    """Another teacher's identity with changed answers; counts what it was asked."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher, self.identity, self.asked = teacher, teacher.identity, 0

    def change(self, logits: Tensor, ids: Tensor) -> Tensor:
        return logits

    def __call__(self, inputs: Any, ids: Tensor | None) -> Tensor:
        assert ids is not None
        self.asked += len(ids)
        return self.change(self.teacher(inputs, ids).clone(), ids)


class Shifted(Told):
    def change(self, logits: Tensor, ids: Tensor) -> Tensor:
        return logits.roll(1, -1)


def test_a_recording_that_the_teacher_would_not_repeat_is_refused(tmp_path: Path) -> None:
    live, batches = Live(net()), data()
    record(live, batches, tmp_path / "cache", quiet=True)
    with pytest.raises(ValueError, match="differs from the teacher's current logits"):
        record(Shifted(live), batches, tmp_path / "cache", quiet=True)


def test_another_key_is_refused_naming_the_field_and_both_values(tmp_path: Path) -> None:
    live, batches, place = Live(net()), augmented(), tmp_path / "cache"
    record(live, batches, place, views=2, quiet=True)
    replayed = batches.replay(2)
    Cached(place, batches=replayed, teacher=live)
    other = net()
    with torch.no_grad():
        other.head.weight.mul_(1.01)
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"teacher": Live(other)}, ["outputs of another teacher", live.identity, Live(other).identity]),
        ({"teacher": Live(net(), fuse_conv_bn=True)}, ["outputs of another teacher", "fuse_conv_bn"]),
        ({"batches": augmented(pixels_seed=1).replay(2)}, ["other data", batches.identity, "record again"]),
        ({"batches": batches.replay(3)}, ["views=2", "views=3", "batches.replay(2)"]),
        ({"batches": batches}, ["views=2", "views=None", "train on batches.replay(2)"]),
        ({"batches": augmented(seed=1).replay(2)}, ["seed=0", "seed=1", "record again"]),
        ({"batches": data(crop=2, flip=True).replay(2)}, ["crop=1", "crop=2"]),
        ({"batches": data(crop=1).replay(2)}, ["flip=True", "flip=False"]),
        ({"batches": batches.clean()}, ["views=2", "views=None"]),
        ({"batches": [1, 2]}, ["other data", "list has no identity"]),
    ]
    for given, parts in cases:
        with pytest.raises(ValueError) as caught:
            Cached(place, **given)
        assert all(part in str(caught.value) for part in (str(place), *parts)), str(caught.value)
    clean = record(live, batches, tmp_path / "clean", quiet=True)
    said = clean.incompatibility(replayed)
    assert said is not None and "recorded with views=None" in said and "leave out views=" in said
    assert live.incompatibility(batches) is None


def test_recording_over_another_recording_is_refused(tmp_path: Path) -> None:
    live, place = Live(net()), tmp_path / "cache"
    record(live, data(), place, quiet=True)
    with pytest.raises(ValueError, match=r"another recording: its precision is 'fp16', requested is 'bf16'"):
        record(live, data(), place, precision="bf16", quiet=True)
    with pytest.raises(ValueError, match=r"another recording: its teacher is"):
        record(Live(net(), fuse_conv_bn=True), data(), place, quiet=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("do not touch")
    with pytest.raises(ValueError, match="exists and is not a teacher cache"):
        record(live, data(), tmp_path / "mine", quiet=True)
    with pytest.raises(ValueError, match="precision 'fp16', 'bf16', 'fp32'; got 'int8'"):
        record(live, data(), tmp_path / "x", precision="int8")
    with pytest.raises(TypeError, match=r"record needs a Teacher; got Block. Wrap a module: teachers.Live\(model\)"):
        record(net(), data(), tmp_path / "x")  # pyright: ignore[reportArgumentType]


class Breaks(Told):
    """Puts a value in row 21."""

    def __init__(self, teacher: Teacher, value: float) -> None:
        super().__init__(teacher)
        self.value = value

    def change(self, logits: Tensor, ids: Tensor) -> Tensor:
        logits[ids == 21, 3] = self.value
        return logits


def test_answers_that_cannot_be_kept_are_refused(tmp_path: Path) -> None:
    live = Live(net())
    cases = [
        (float("nan"), "fp32", "the teacher's logits contain NaN in row 21"),
        (float("inf"), "fp32", "the teacher's logits contain infinity in row 21"),
        (
            7e4,
            "fp16",
            r"reach 70000 \(first in row 21\), and the largest fp16 .* 65504. Record with precision='bf16' or 'fp32'",
        ),
        (3.4e38, "bf16", r"largest bf16 number is 3.38953e\+38. Record with precision='fp32'"),
    ]
    for value, precision, message in cases:
        with pytest.raises(ValueError, match=message):
            record(Breaks(live, value), data(), tmp_path / "cache", precision=precision, quiet=True)
        assert not (tmp_path / "cache").exists()
        shutil.rmtree(tmp_path / "cache.partial", ignore_errors=True)
    masked = record(Breaks(live, -float("inf")), data(), tmp_path / "masked", quiet=True)
    assert float(masked(torch.zeros(1), torch.tensor([21]))[0, 3]) == -float("inf")
    masked.verify(Breaks(live, -float("inf")), data(), rows=200)

    class Flat(Told):
        def change(self, logits: Tensor, ids: Tensor) -> Tensor:
            return logits.flatten()

    with pytest.raises(ValueError, match=r"only logits \(B, C\) .* here B = 8; the teacher returned \(40,\)"):
        record(Flat(live), data(), tmp_path / "flat", quiet=True)


def test_a_changed_or_truncated_file_is_refused(tmp_path: Path, monkeypatch) -> None:
    place = tmp_path / "cache"
    record(Live(net()), data(), place, quiet=True)
    array, key = place / "logits.npy", place / "key.json"
    whole, kept = array.read_bytes(), key.read_text()

    array.write_bytes(whole[:-20])
    with pytest.raises(CorruptCacheError, match=r"logits.npy cannot be read .* record it again"):
        Cached(place)
    array.write_bytes(whole + b"more")
    with pytest.raises(CorruptCacheError, match=r"logits.npy has \d+ bytes"):
        Cached(place)
    array.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CorruptCacheError, match=r"logits.npy was changed since it was recorded"):
        Cached(place)
    monkeypatch.setattr("tempering.teachers.cache.base.CHECKED", 0)
    Cached(place)  # a big one is not read through when it is opened
    with pytest.raises(CorruptCacheError, match="was changed"):
        Cached(place, checksum=True)
    array.unlink()
    with pytest.raises(CorruptCacheError, match=r"logits.npy cannot be read"):
        Cached(place)
    array.write_bytes(whole)
    key.write_text(kept[:-10])
    with pytest.raises(CorruptCacheError, match=r"key.json cannot be read"):
        Cached(place)
    key.write_text(json.dumps({**json.loads(kept), "format": 9}))
    with pytest.raises(CorruptCacheError, match="has format 9; this version reads 1"):
        Cached(place)
    with pytest.raises(FileNotFoundError, match=r"there is no teacher cache in .*nowhere: no key.json. Make one"):
        Cached(tmp_path / "nowhere")


def test_verify_names_the_row_that_is_not_the_teachers(tmp_path: Path) -> None:
    live = Live(net())
    cached = record(Breaks(live, 1.5), data(), tmp_path / "cache", quiet=True)
    with pytest.raises(ValueError, match=r"row 21 differs from the teacher's current logits: 1 of \d+ compared rows"):
        cached.verify(live, data(), rows=400)
    with pytest.raises(ValueError, match="outputs for other data"):
        cached.verify(live, data(pixels_seed=1))
    views = record(live, augmented(), tmp_path / "views", views=2, quiet=True)
    with pytest.raises(ValueError, match="seed=0, and data have seed=1"):
        views.verify(live, augmented(seed=1))
    with pytest.raises(ValueError, match="differs from the teacher's current logits"):
        views.verify(Live(nn.Sequential(net(), nn.Softplus())), augmented())


# cached: kills, full disks, many processes


class Stops(Told):
    """Falls over after so many rows."""

    def __init__(self, teacher: Teacher, rows: int) -> None:
        super().__init__(teacher)
        self.rows = rows

    def change(self, logits: Tensor, ids: Tensor) -> Tensor:
        if self.asked > self.rows:
            raise RuntimeError("power cut")
        return logits


@pytest.fixture
def often(monkeypatch) -> None:
    """Every batch is written at once."""
    monkeypatch.setattr(recording, "EVERY", 0.0)


def test_a_recording_cut_short_is_served_to_nobody_and_goes_on(tmp_path: Path, often) -> None:
    live, batches, place = Live(net()), augmented(), tmp_path / "cache"
    partial = tmp_path / "cache.partial"
    with pytest.raises(RuntimeError, match="power cut"):
        record(Stops(live, 32), batches, place, views=2, quiet=True)
    with pytest.raises(FileNotFoundError, match=r"cache.partial is an unfinished recording; .* record\(\) resumes"):
        Cached(place)
    with pytest.raises(FileNotFoundError):
        Cached(partial.parent / "other")
    with pytest.raises(ValueError, match=r"cache.partial contains another recording: its augmentation is"):
        record(live, batches, place, views=3, quiet=True)
    # as a kill leaves it: rows behind the last one the log knows, and a torn line
    with open(partial / "logits.npy", "ab") as file:
        file.write(b"half a row")
    with open(partial / "done.jsonl", "ab") as file:
        file.write(b'{"done": 4')
    counting = Told(live)
    cached = record(counting, batches, place, views=2, quiet=True)
    assert counting.asked == 80 - 32
    assert not partial.exists()
    assert cached.key["sha256"] == record(live, batches, tmp_path / "straight", views=2, quiet=True).key["sha256"]


def test_a_half_done_recording_is_no_cache_even_when_asked_for_by_name(tmp_path: Path, often) -> None:
    with pytest.raises(RuntimeError, match="power cut"):
        record(Stops(Live(net()), 32), data(), tmp_path / "cache", quiet=True)
    with pytest.raises(CorruptCacheError, match="unfinished"):
        Cached(tmp_path / "cache.partial")


def test_a_partial_recording_that_makes_no_sense_is_begun_again(tmp_path: Path, often) -> None:
    live, place, partial = Live(net()), tmp_path / "cache", tmp_path / "cache.partial"
    with pytest.raises(RuntimeError, match="power cut"):
        record(Stops(live, 16), data(), place, quiet=True)
    os.truncate(partial / "logits.npy", 100)
    counting = Told(live)
    record(counting, data(), place, quiet=True).verify(live, data())
    assert counting.asked == 40


KILLED = """
    import sys, time
    sys.path.insert(0, sys.argv[1])
    import torch
    torch.set_num_threads(1)
    from tests.test_teachers import Live, Told, augmented, net, record, recording
    recording.EVERY = 0.0

    class Slow(Told):
        def change(self, logits, ids):
            time.sleep(0.2)
            return logits

    record(Slow(Live(net())), augmented(), sys.argv[2], views=2, quiet=True)
"""


def test_a_recording_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    place, partial = tmp_path / "cache", tmp_path / "cache.partial"
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(ROOT), str(place)]
    process = subprocess.Popen(command)
    log, end = partial / "done.jsonl", time.monotonic() + 60
    while time.monotonic() < end and not (log.exists() and log.read_bytes().count(b"\n") >= 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert partial.is_dir() and not place.exists()
    live = Live(net())
    counting = Told(live)
    cached = record(counting, augmented(), place, views=2, quiet=True)
    assert 0 < counting.asked <= 80 - 3 * 8
    cached.verify(live, augmented(), rows=200)
    assert cached.key["sha256"] == record(live, augmented(), tmp_path / "straight", views=2, quiet=True).key["sha256"]


def test_a_full_disk_is_said_and_what_is_done_is_kept(tmp_path: Path, often, monkeypatch) -> None:
    live, place, writes = Live(net()), tmp_path / "cache", []
    plain = recording.os.fsync

    def full(descriptor: int) -> None:
        writes.append(descriptor)
        if len(writes) == 6:  # the key, then array and log of each batch: the third batch's array
            raise OSError(28, "No space left on device")
        plain(descriptor)

    monkeypatch.setattr(recording.os, "fsync", full)
    with pytest.raises(OSError, match=r"the teacher's outputs \(0.0 MB\) under .*: No space left") as caught:
        record(live, data(), place, quiet=True)
    assert caught.value.errno == 28
    counting = Told(live)
    record(counting, data(), place, quiet=True).verify(live, data())
    assert counting.asked == 40 - 16


def _worker(path: str, answers: Any) -> None:
    torch.set_num_threads(1)
    counting = Told(Live(net()))
    cached = record(counting, augmented(), path, views=2, quiet=True)
    answers.put((counting.asked, cached(torch.zeros(1), torch.arange(80)).tolist()))


def test_of_several_processes_one_records_and_all_read(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    workers = [spawn.Process(target=_worker, args=(str(tmp_path / "cache"), answers)) for _ in range(2)]
    for process in workers:
        process.start()
    counts, logits = zip(*(answers.get(timeout=60) for _ in workers), strict=True)
    for process in workers:
        process.join(timeout=60)
        assert process.exitcode == 0
    few, all_rows = sorted(counts)
    assert all_rows == 80 and few <= 32, "one records; one that comes when it is done compares a sample"
    cached = Cached(tmp_path / "cache", batches=augmented().replay(2))
    assert logits[0] == logits[1] == cached(torch.zeros(1), torch.arange(80)).tolist()


def test_a_cache_travels_by_its_path(tmp_path: Path) -> None:
    cached = record(Live(net()), data(), tmp_path / "cache", quiet=True)
    twin = copy.deepcopy(cached)
    ids = torch.arange(40)
    assert torch.equal(twin(torch.zeros(1), ids), cached(torch.zeros(1), ids))
    assert twin.identity == cached.identity


def test_a_cache_of_the_training_set_is_not_asked_about_another(tmp_path: Path) -> None:
    """Its rows are the training set's; the test set's ids would find other images' answers in it."""
    train, test = data(), data(pixels_seed=1)
    live, student = Live(net()), net()
    cached = record(live, train, tmp_path / "cache", quiet=True)
    options = {"method": KD(hard=1.0), "epochs": 1, "quiet": True, "selfcheck": False}
    run = distill(copy.deepcopy(student), cached, train, test=test, **options)
    assert "agreement" not in run.last["test"]
    asked = distill(copy.deepcopy(student), live, train, test=test, **options)
    assert "agreement" in asked.last["test"]
    seen = distill(copy.deepcopy(student), cached, train, test=train.clean(), **options)
    assert "agreement" in seen.last["test"], "about its own images it is"
    cached.fallback = live
    helped = distill(copy.deepcopy(student), cached, train, test=test, **options)
    assert helped.last["test"].keys() == asked.last["test"].keys(), "the model answers what its cache does not hold"
