"""Inconsistent KD: the attack, its bounds and its store, the method's step, the augmentation, and the spectra."""

from __future__ import annotations

import copy
import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tempering.data.inconsistent import FILL, SampleSpecific
from tempering.data.spectrum import spectrum
from tempering.data.synthetic_shapes import synthetic_shapes
from tempering.methods import AT, CWD, FGD, KD, MGD, Imitation, InconsistentDetection, Step
from tempering.methods.detection._adversary import FeatureAttack, digest
from tempering.methods.detection._stored import CorruptStoreError
from tempering.models.fcos import FCOS
from tempering.reports.spectra import write_spectra
from tempering.rows import total
from tempering.tasks.detection import Detection
from tempering.teachers import Live
from tempering.training.distill import distill
from tests.paths import ROOT
from tests.runs import identical, left, stop_at

PUBLISHED = FeatureAttack(eps=8 / 255, step_size=2 / 255, steps=5, decay=1.0, resize=0.9, diversity=0.5, seed=0)
SPLITS = synthetic_shapes(size=64, train=24, test=4, batch_size=4, flip=False)


def net(width: float = 0.5, seed: int = 0, **more: Any) -> FCOS:
    torch.manual_seed(seed)
    return FCOS(3, width=width, norm="group", **more)


def scene() -> dict[str, Any]:
    """Four images; the first has no boxes."""
    batch = next(iter(SPLITS.train.clean()))
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    return batch | {"targets": [none, *batch["targets"][1:]]}


def names(batch: dict[str, Any]) -> list[str]:
    return [digest(image, target) for image, target in zip(batch["images"], batch["targets"], strict=True)]


def attacked(attack: FeatureAttack, teacher: nn.Module, batch: dict[str, Any]) -> Tensor:
    by = attack(teacher, batch["images"], batch["targets"], names(batch))
    return attack.perturbed(batch["images"], by)


def losses(teacher: FCOS, images: Tensor, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return teacher.class_loss({"images": images, "targets": batch["targets"]})


# the attack


@pytest.mark.parametrize("eps", [8 / 255, 3.5 / 255, 1.9 / 255, 40 / 255])
@pytest.mark.parametrize("bytes_", [True, False], ids=["bytes", "floats"])
def test_adversaries_stay_within_eps_and_the_pixels_range(eps: float, bytes_: bool) -> None:
    teacher, batch = net().eval().requires_grad_(False), scene()
    if not bytes_:
        torch.manual_seed(3)
        noise = torch.rand(batch["images"].shape)
        batch["images"] = torch.where(noise < 0.3, noise * 1e-3, torch.where(noise > 0.7, 1 - 1e-3 * noise, noise))
    there = attacked(replace(PUBLISHED, eps=eps, step_size=max(2 / 255, eps / 4)), teacher, batch)
    assert there.dtype == torch.float32 and float(there.min()) >= 0.0 and float(there.max()) <= 1.0
    gap = (there.double() - batch["images"].double()).abs()
    assert float(gap.max()) <= eps and float(gap.flatten(1).amax(1).min()) > 0.5 * eps


def test_adversaries_raise_the_teacher_s_classification_loss() -> None:
    batch = scene()
    for seed in (0, 1):
        teacher = net(seed=seed).eval().requires_grad_(False)
        there = attacked(PUBLISHED, teacher, batch)
        before, after = losses(teacher, batch["images"], batch), losses(teacher, there, batch)
        assert bool((after > before).all()), (before, after)
        # and more than as much noise does
        sign = (torch.rand(batch["images"].shape) > 0.5).float() * 2 - 1
        noisy = losses(teacher, (batch["images"] + 8 / 255 * sign).clamp(0, 1), batch)
        assert float((after - before).mean()) > 2 * float((noisy - before).mean())


def test_the_attack_is_momentum_fgsm() -> None:
    """Written out, without input diversity; whole gray levels are reached exactly."""
    teacher, batch = net().eval().requires_grad_(False), scene()
    clean = batch["images"]
    attack = replace(PUBLISHED, diversity=0.0, decay=0.7, steps=3)
    levels, momentum = torch.zeros_like(clean), torch.zeros_like(clean)
    for _ in range(3):
        x = (clean + levels / 255).requires_grad_()
        slope = torch.autograd.grad(teacher.class_loss(batch | {"images": x}).sum(), x)[0]
        momentum = 0.7 * momentum + slope / slope.abs().sum((1, 2, 3), keepdim=True)
        levels = (levels + 2 * momentum.sign()).clamp(-8, 8)
        levels = ((255 * clean).round() + levels).clamp(0, 255) - (255 * clean).round()
    got = attack(teacher, clean, batch["targets"], names(batch))
    assert got.dtype == torch.int8
    assert float((got == levels).double().mean()) > 0.999  # a slope of rounding noise may have either sign
    there = attack.perturbed(clean, levels.to(torch.int8))
    torch.testing.assert_close(there, (clean + levels / 255).detach(), rtol=0, atol=1e-7)


def test_boxes_follow_an_image_that_shrinks() -> None:
    attack = replace(PUBLISHED, diversity=1.0, resize=0.5)
    image = torch.zeros(3, 48, 80)
    image[:, 12:24, 20:60] = 1.0
    target = {"boxes": torch.tensor([[20.0, 12.0, 60.0, 24.0]]), "labels": torch.tensor([1])}
    sizes = set()
    for i in range(20):
        shown, moved = attack._diverse(image[None], [target], [attack._draw(str(i))])
        assert shown.shape == (1, 3, 48, 80) and moved[0]["labels"] is target["labels"]
        x0, y0, x1, y1 = moved[0]["boxes"][0].tolist()
        lit = (shown[0, 0] > 0.5).nonzero()
        found = [*lit.amin(0).flip(0).tolist(), *(lit.amax(0) + 1).flip(0).tolist()]
        assert max(abs(a - b) for a, b in zip(found, (x0, y0, x1, y1), strict=True)) <= 1.0
        assert (x1 - x0) / (y1 - y0) == pytest.approx(40 / 12, rel=0.05), "it keeps its shape"
        assert x0 >= 0 and y0 >= 0 and x1 <= 80 and y1 <= 48
        sizes.add(round(x1 - x0))
    assert min(sizes) < 27 and max(sizes) > 33
    never = replace(attack, diversity=0.0)._diverse(image[None], [target], [attack._draw("0")])
    assert torch.equal(never[0][0], image) and torch.equal(never[1][0]["boxes"], target["boxes"])


def test_it_is_reproducible_by_its_seed_and_knows_no_batches() -> None:
    teacher, batch = net().eval().requires_grad_(False), scene()
    torch.manual_seed(5)
    first = attacked(PUBLISHED, teacher, batch)
    drawn = torch.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.get_rng_state()), "global random numbers are left alone"
    torch.manual_seed(6)
    assert torch.equal(attacked(PUBLISHED, teacher, batch), first)
    assert not torch.equal(attacked(replace(PUBLISHED, seed=1), teacher, batch), first)
    turned = {"images": batch["images"].flip(0), "targets": batch["targets"][::-1]}
    alike = (attacked(PUBLISHED, teacher, turned).flip(0) == first).double().mean()
    assert float(alike) > 0.999  # convolutions of other batches round otherwise


def test_a_teacher_without_a_slope_changes_nothing() -> None:
    class Flat(nn.Module):
        def class_loss(self, inputs: dict[str, Any]) -> Tensor:
            return 0.0 * inputs["images"].sum((1, 2, 3)) if self.training else torch.ones(len(inputs["images"]))

    batch = scene()
    for teacher in (Flat(), Flat().eval()):
        assert torch.equal(attacked(PUBLISHED, teacher, batch), batch["images"])


def test_what_an_image_is_known_by() -> None:
    batch = scene()
    image, target = batch["images"][1], batch["targets"][1]
    same = digest(image, target)
    assert same == digest(image + 1e-4, {k: v.clone() for k, v in target.items()})
    others = [
        digest(image + 1 / 255, target),
        digest(image, target | {"boxes": target["boxes"] + 0.5}),
        digest(image, target | {"labels": target["labels"] + 1}),
        digest(image.transpose(1, 2), target),
    ]
    assert len({same, *others}) == 5


# the method


def step_of(student: nn.Module, teacher: nn.Module, batch: dict[str, Any], progress: float = 0.5) -> Step:
    task, live = Detection(class_rows=False), Live(teacher)
    return Step(
        student, live, *task.inputs(batch), batch, progress, task.rows, teacher_with_grad=live.forward_with_grad
    )


def made(student: nn.Module, teacher: nn.Module, batch: dict[str, Any], **options: Any) -> InconsistentDetection:
    torch.manual_seed(2)
    method = InconsistentDetection(**options)
    step = step_of(student, teacher, batch)
    method.bind_teacher(Live(teacher).model)
    with torch.no_grad():
        method.setup(step.forward()[-1])
    return method


@pytest.mark.parametrize("neck", [48, 16])
def test_its_terms_are_the_base_s_and_the_distance_on_adversaries(neck: int) -> None:
    student, teacher, batch = net(seed=1, neck=neck), net(width=1.0), scene()
    method = made(student, teacher, batch, base=CWD(feature=2.0), adversarial=0.25)
    step = step_of(student, teacher, batch)
    terms = dict(method.step(step))
    assert set(terms) == {"feature", "hard", "adversarial"} and step.rows is not None
    there = attacked(PUBLISHED, teacher, batch)
    assert torch.equal(method.adversaries(batch["images"], batch["targets"]), there)
    want = torch.zeros(4)
    for phi, s, t in zip(method.projectors, student.levels_of(there), teacher.levels_of(there), strict=True):
        assert isinstance(phi, nn.Conv2d if neck == 16 else nn.Identity)
        want = want + 0.25 * (phi(s) - t).square().sum((1, 2, 3))
    torch.testing.assert_close(terms["adversarial"], want, rtol=1e-5, atol=1e-5)
    base = method.base(step.rows, 0.5)
    torch.testing.assert_close({n: terms[n] for n in base}, base, rtol=0, atol=0)
    total(terms, step.rows).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())
    assert student.stem[0].weight.grad is not None and student.stem[0].weight.grad.any()
    assert all(p.grad is None for p in teacher.parameters())


def test_it_is_off_after_two_thirds() -> None:
    student, teacher, batch = net(seed=1), net(), scene()
    method = made(student, teacher, batch)
    assert method.until == pytest.approx(2 / 3) and isinstance(method.base, FGD)
    asked = []
    teacher.class_loss = lambda inputs: asked.append(1) or FCOS.class_loss(teacher, inputs)  # pyright: ignore
    for progress, on in ((16 / 24, True), (16 / 24 + 1e-6, False), (1.0, False)):
        asked.clear()
        terms = method.step(step_of(student, teacher, batch, progress))
        assert bool(terms["adversarial"].all()) == on == bool(asked)
        assert terms["foreground"][1:].any()
    method.adversarial = 0.0
    assert not method.step(step_of(student, teacher, batch, 0.1))["adversarial"].any() and not asked


def test_images_of_no_weight_are_not_attacked() -> None:
    student, teacher, batch = net(seed=1), net(), scene()
    method = made(student, teacher, batch, adversarial=1.0)

    def weighed(weight: Tensor, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        step = step_of(student, teacher, batch)
        rows = step.make_rows
        step.make_rows = lambda s, t, b: [rows(s, t, b)[0].replace(weight=weight)]
        terms = dict(method.step(step))
        assert step.rows is not None
        return total(terms, step.rows).detach(), {name: term.detach() for name, term in terms.items()}

    loss, terms = weighed(torch.tensor([1.0, 0.0, 2.0, 0.0]), batch)
    few = {"images": batch["images"][::2], "targets": batch["targets"][::2]}
    want, fewer = weighed(torch.tensor([1.0, 2.0]), few)
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(terms["adversarial"][::2], fewer["adversarial"], rtol=1e-4, atol=1e-4)
    assert not terms["adversarial"][1::2].any()
    assert float(weighed(torch.zeros(4), batch)[0]) == 0.0


def test_a_teacher_in_half_precision() -> None:
    student, batch = net(seed=1), scene()
    live = Live(net(), precision="bf16")
    method = InconsistentDetection(FGD(), adversarial=1.0)
    method.bind_teacher(live.model)
    task = Detection(class_rows=False)
    step = Step(student, live, *task.inputs(batch), batch, 0.1, task.rows, teacher_with_grad=live.forward_with_grad)
    method.setup(step.forward()[-1])
    terms = method.step(step)
    assert terms["adversarial"].all() and terms["adversarial"].isfinite().all()


@pytest.mark.parametrize("method", [Imitation(scored=True), AT(), FGD()], ids=["scores", "maps alone", "boxes"])
def test_methods_over_maps_find_theirs_among_a_detector_s(method: Any) -> None:
    student, teacher, batch = net(seed=1), net(width=1.0), scene()
    rows = step_of(student, teacher, batch).forward()[-1]
    method.setup(rows)
    total(method(rows, 0.5), rows).backward()
    assert rows.features["scores"][1].shape == (4, 64 + 16 + 4) and rows.features["boxes"][1][0].eq(-1).all()
    assert student.stem[0].weight.grad is not None and student.stem[0].weight.grad.any()


# the store


def test_what_is_stored_is_what_was_made(tmp_path: Path) -> None:
    student, teacher, batch = net(seed=1), net(), scene()
    options = {"base": MGD(), "adversarial": 1.0}
    fresh = made(student, teacher, batch, **options)
    kept = made(student, teacher, batch, **options, cache=str(tmp_path / "kept"))

    def value(method: InconsistentDetection) -> Tensor:
        return method.step(step_of(student, teacher, batch))["adversarial"].detach()

    want, first = value(fresh), value(kept)
    files = sorted((tmp_path / "kept").rglob("*.safetensors"))
    assert torch.equal(first, want) and len(files) == 4
    calls: list[int] = []
    teacher.class_loss = lambda inputs: calls.append(1) or FCOS.class_loss(teacher, inputs)  # pyright: ignore
    again = made(student, teacher, batch, **options, cache=str(tmp_path / "kept"))
    assert torch.equal(value(again), want) and not calls
    assert json.loads((tmp_path / "kept" / "key.json").read_text())["eps"] == 8 / 255
    # an image that is missing is made, alone
    files[0].unlink()
    value(again)
    assert len(calls) == 5 and files[0].exists()


def test_a_broken_or_foreign_store_is_named(tmp_path: Path) -> None:
    student, teacher, batch = net(seed=1), net(), scene()
    folder = tmp_path / "kept"
    options = {"cache": str(folder)}
    method = made(student, teacher, batch, **options)
    method.step(step_of(student, teacher, batch))
    file = sorted(folder.rglob("*.safetensors"))[0]
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(CorruptStoreError, match=rf"{file.name} cannot be read .* Remove it, and it is computed again"):
        method.step(step_of(student, teacher, batch))
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CorruptStoreError, match=rf"{file.name} is corrupt: its values do not match its checksum"):
        method.step(step_of(student, teacher, batch))
    file.unlink()
    method.step(step_of(student, teacher, batch))
    assert file.read_bytes() == whole
    with pytest.raises(ValueError, match=r"perturbations of another teacher: its teacher is .* Give another cache="):
        made(student, net(seed=9), batch, **options)
    with pytest.raises(ValueError, match="perturbations of another attack: its steps is 5, and 7 is needed"):
        made(student, teacher, batch, **options, steps=7)
    (folder / "key.json").write_text("{")
    with pytest.raises(CorruptStoreError, match=r"key.json is not a key of stored perturbations"):
        made(student, teacher, batch, **options)


# runs


def run(method: Any, out: Path | None = None, **more: Any) -> Any:
    settings = {"steps": 6, "accelerator": "cpu", "quiet": True, "log_every": 1, "selfcheck": False} | more
    splits = synthetic_shapes(size=64, train=16, test=4, batch_size=4)
    optimizer = partial(torch.optim.AdamW, lr=1e-3)
    task = Detection(class_rows=False)
    torch.manual_seed(8)
    made = method()
    return distill(
        net(seed=1, neck=16), net(), splits.train, method=made, task=task, optimizer=optimizer, out=out, **settings
    )


def test_a_run_switches_it_off_and_says_so(tmp_path: Path) -> None:
    found = run(lambda: InconsistentDetection(MGD(), adversarial=1e-3), tmp_path, selfcheck=True)
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [line["terms"]["adversarial"] > 0 for line in lines] == [True] * 4 + [False] * 2
    assert found.facts["method"]["name"] == "InconsistentDetection"
    assert found.facts["selfcheck"]["checks"]["teacher frozen"] == "ok"


def test_stopped_and_resumed_bit_for_bit(tmp_path: Path) -> None:
    """The masks of MGD are drawn by torch's generator, which a checkpoint holds."""

    def method() -> InconsistentDetection:
        return InconsistentDetection(MGD(), adversarial=1e-3)

    more = {"checkpoint_every": 2, "validation": synthetic_shapes(size=64, train=4, test=4, batch_size=4).test}
    run(method, tmp_path / "whole", **more)
    with pytest.raises(KeyboardInterrupt):
        run(method, tmp_path / "stopped", on_step=stop_at(3), **more)
    run(method, tmp_path / "stopped", **more)
    assert identical(left(tmp_path / "whole"), left(tmp_path / "stopped"))


def test_messages() -> None:
    with pytest.raises(TypeError, match=r"needs a method over necks as base, such as FGD\(\) or MGD\(\); got KD"):
        InconsistentDetection(KD())  # pyright: ignore
    with pytest.raises(TypeError, match=r"needs a detector with class_loss\(inputs\), .*; got Linear"):
        InconsistentDetection().bind_teacher(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="got NoneType"):
        InconsistentDetection().bind_teacher(None)
    for options, said in (
        ({"eps": 8.0}, r"eps in \(0, 127/255\] and step_size in \(0, 1\], of pixels in \[0, 1\]; got 8.0"),
        ({"step_size": 0.0}, "got 0.03.* and 0.0"),
        ({"steps": 0}, r"steps >= 1, resize in \(0, 1\] and diversity in \[0, 1\]; got 0, 0.9 and 0.5"),
        ({"resize": 1.5}, "got 5, 1.5"),
        ({"until": 16}, r"until in \[0, 1\], the share of the run"),
        ({"adversarial": -1.0}, "adversarial >= 0"),
    ):
        with pytest.raises(ValueError, match=rf"^InconsistentDetection needs .*{said}"):
            InconsistentDetection(**options)
    batch, teacher = scene(), net()
    with pytest.raises(RuntimeError, match=r"call method.bind_teacher\(teacher.model\) before the first step"):
        InconsistentDetection().adversaries(batch["images"], batch["targets"])
    met = InconsistentDetection()
    met.bind_teacher(teacher)
    with pytest.raises(ValueError, match=r"needs pixels in \[0, 1\]; got 0 to 255. Normalize inside"):
        met.adversaries((255 * batch["images"]).round() * 0 + torch.tensor([0.0, 255.0]).repeat(32), batch["targets"])
    method = made(net(seed=1), teacher, batch)
    step = step_of(net(seed=1), teacher, batch)
    step.student_inputs = {"images": batch["images"]}
    with pytest.raises(ValueError, match=r"a detector's inputs, .*; got dict. Use tasks.Detection\(class_rows=False\)"):
        method.step(step)
    other = copy.deepcopy(method)
    other.base.names = ("map",)
    step = step_of(net(seed=1), teacher, batch)
    rows = step.forward()[-1]
    with pytest.raises(ValueError, match=r"a base over levels, such as names=\('p0', 'p1'\); got names=\('map',\)"):
        other._inconsistent(step, rows)


# the augmentation


def look(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictured(*boxes: list[float], size: tuple[int, int] = (100, 160)) -> tuple[Tensor, dict[str, Any]]:
    image = torch.randint(60, 200, (3, *size), generator=look(9), dtype=torch.uint8)
    found = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    return image, {"boxes": found, "labels": torch.arange(len(boxes)), "scale": 1.0}


def test_images_of_small_objects_get_noise() -> None:
    augment = SampleSpecific()
    for boxes in ([], [[10.0, 10.0, 40.0, 43.9]]):  # 30 x 33.9 is below 32 x 32
        image, target = pictured(*boxes)
        noisy = 0
        for seed in range(200):
            seen, after = augment(image, target, look(seed))
            assert seen.dtype == torch.uint8 and torch.equal(after["boxes"], target["boxes"])
            if not torch.equal(seen, image):
                noisy += 1
                gap = seen.float() - image.float()
                assert float(gap.std()) == pytest.approx(0.08 * 255, rel=0.03) and abs(float(gap.mean())) < 0.5
        assert 40 <= noisy <= 80  # of 200, at 0.3
    always = SampleSpecific(probability=1.0)
    assert torch.equal(always(image, target, look(4))[0], always(image, target, look(4))[0])
    assert not torch.equal(always(image, target, look(4))[0], always(image, target, look(5))[0])


def test_other_images_are_cropped() -> None:
    image, target = pictured([20.0, 10.0, 80.0, 90.0], [150.0, 0.0, 160.0, 12.0], [0.0, 0.0, 4.0, 100.0])
    sizes, dropped = [], 0
    for seed in range(100):
        seen, after = SampleSpecific()(image, target, look(seed))
        assert seen.shape == image.shape and set(after) == set(target) and after["scale"] == 1.0
        # the crop's size, by what was filled; its place, by where the pixels come from
        filled = (seen == torch.tensor(FILL, dtype=torch.uint8).view(3, 1, 1)).all(0)
        height, width = int((~filled[:, 0]).sum()), int((~filled[0]).sum())
        sizes.append((height / 100, width / 160))
        strips = image.unfold(1, height, 1).unfold(2, width, 1)
        found = (strips == seen[None, :, :height, :width].transpose(0, 1)[:, :, None]).flatten(3).all(3).all(0)
        ((top, left),) = found.nonzero().tolist()
        for box, label in zip(after["boxes"].tolist(), after["labels"].tolist(), strict=True):
            x0, y0, x1, y1 = target["boxes"][label].tolist()
            want = [max(x0 - left, 0), max(y0 - top, 0), min(x1 - left, width), min(y1 - top, height)]
            assert box == want and box[2] > box[0] and box[3] > box[1]
        gone = set(range(3)) - set(after["labels"].tolist())
        dropped += len(gone)
        for label in gone:
            x0, y0, x1, y1 = target["boxes"][label].tolist()
            assert min(x1 - left, width) <= max(x0 - left, 0) or min(y1 - top, height) <= max(y0 - top, 0)
    assert dropped > 10
    for side in zip(*sizes, strict=True):
        assert 0.79 <= min(side) < 0.84 and 0.96 < max(side) <= 1.0


def test_a_crop_without_objects_is_not_made() -> None:
    image, target = pictured([0.0, 0.0, 1.0, 100.0], size=(100, 4000))
    wide = SampleSpecific(small=5.0)
    kept = [wide(image, target, look(seed)) for seed in range(50)]
    assert all(len(after["boxes"]) == 1 for _, after in kept)
    assert sum(torch.equal(seen, image) for seen, _ in kept) > 25


def test_sizes_are_those_of_the_original_and_the_end_is_plain() -> None:
    augment = SampleSpecific(probability=1.0)
    image, target = pictured([0.0, 0.0, 20.0, 20.0])
    assert augment.all_small(target) and not augment.all_small(target | {"scale": 0.5})
    assert augment.all_small({"boxes": torch.tensor([[5.0, 5.0, 5.0, 5.0], [9.0, 9.0, 2.0, 2.0]])})
    for progress, same in ((0.0, False), (0.66, False), (16 / 24, True), (1.0, True)):
        assert torch.equal(augment(image, target, look(), progress)[0], image) == same
    assert "noise=0.08" in repr(augment) and json.dumps(augment.hyperparameters())
    for wrong in ({"noise": 2.0}, {"probability": -0.1}, {"until": 16}, {"crop": 0.0}, {"small": -1.0}):
        with pytest.raises(ValueError, match=f"SampleSpecific needs .*{next(iter(wrong))}"):
            SampleSpecific(**wrong)


def test_a_loader_that_augments() -> None:
    def batches(**more: Any) -> list[Tensor]:
        from tempering.data.detection import DetectionLoader

        plain = SPLITS.train
        loader = DetectionLoader(
            plain.images, plain.boxes, plain.labels, batch_size=8, class_names=plain.class_names, epochs=3, **more
        )
        out = []
        for epoch in range(3):
            loader.set_epoch(epoch)
            out.append(torch.cat([batch["images"] for batch in loader]))
        return out

    plain, ours, again = batches(), *(batches(augment=[SampleSpecific(probability=1.0)]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    changed = [not torch.equal(a, b) for a, b in zip(ours, plain, strict=True)]
    assert changed == [True, True, False], "two of three epochs"


# the spectrum


def test_the_spectrum_of_a_wave_lies_in_its_ring() -> None:
    at = torch.arange(64)
    for cycles in (4, 24):
        wave = 0.5 + 0.4 * torch.cos(2 * torch.pi * cycles / 64 * at).expand(3, 64, 64)
        found = spectrum([wave, wave], low=16)
        best = max((i for i in range(32) if found["profile"][i] is not None), key=lambda i: found["profile"][i])
        assert abs(found["frequency"][best] - cycles / 64) <= 0.5 / 32 and found["images"] == 2
        assert found["high"] == pytest.approx(float(cycles == 24), abs=1e-6)
        assert found["low"] + found["high"] == pytest.approx(1.0)
        assert len(found["map"]) == 24 and json.dumps(found)
    flat = spectrum([torch.full((1, 9, 12), 0.3)])
    assert flat["low"] == 1.0 and max(v for v in flat["profile"] if v is not None) < -15
    with pytest.raises(ValueError, match="got no images"):
        spectrum([])
    with pytest.raises(ValueError, match="low >= 1"):
        spectrum([torch.zeros(1, 4, 4)], low=0)


def test_noise_and_adversaries_are_detail_and_the_figures_say_so(tmp_path: Path) -> None:
    teacher, batch = net().eval().requires_grad_(False), scene()
    generator = look(1)
    smooth = nn.functional.avg_pool2d(batch["images"], 5, stride=1, padding=2)
    noisy = (smooth + 0.08 * torch.randn(smooth.shape, generator=generator)).clamp(0, 1)
    batch["images"] = smooth
    kinds = {"plain": smooth, "noisy": noisy, "adversarial": attacked(PUBLISHED, teacher, batch)}
    found = {name: spectrum(images, low=30) for name, images in kinds.items()}
    assert found["noisy"]["high"] > found["adversarial"]["high"] > found["plain"]["high"]
    paths = write_spectra(found, tmp_path / "figures")
    assert [p.name for p in paths] == ["spectrum.svg", "spectra.svg"]
    for path in paths:
        text = path.read_text()
        ElementTree.fromstring(text)
        assert all(name in text for name in found) and "nan" not in text.lower().replace("nance", "")
    assert paths[1].read_text().count("<rect") == 3 * 24 * 24


def test_the_figures_of_the_page_are_made_by_one_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pycocotools")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import spectra  # pyright: ignore[reportMissingImports]

    where = [f"--{name}={tmp_path / name}" for name in ("runs", "out", "figures")]
    spectra.main(["--size=32", "--images=6", "--epochs=1", "--subset=8", "--teacher=fcos_nano", *where])
    record = json.loads((tmp_path / "out" / "spectra.json").read_text())
    assert set(record["spectra"]) == {"as they are", "crop", "noise", "adversaries"} and record["commit"]
    high = {kind: said["high"] for kind, said in record["spectra"].items()}
    assert high["noise"] > high["as they are"] and all(said["images"] == 6 for said in record["spectra"].values())
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == ["spectra.svg", "spectrum.svg"]
    assert "noise        6 images" in capsys.readouterr().out
