"""Batches: the pixels, the order, the ids, and every way to cut or share them; digits, folders, datasets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tempering.data import Batches, Splits, digits, hugging_face, image_folder

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
PROMISED = {"y": [7, 6, 2, 2, 0, 2], "x": [0, 6, 5, 2, 8, 4], "flip": [1, 1, 0, 0, 0, 1], "order": [4, 2, 5, 0, 3, 1]}


def made(n: int = 50, *, batch_size: int = 8, side: int = 8, classes: int = 5, **more) -> Batches:
    """Batches of random images whose labels go round."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (n, 3, side, side + 2), generator=generator, dtype=torch.uint8)
    return Batches(images, torch.arange(n) % classes, batch_size=batch_size, mean=MEAN, std=STD, **more)


def slow(batches: Batches, index: int, view: int) -> torch.Tensor:
    """One image as torchvision makes it: pad the pixels, crop, flip, to [0, 1], normalize; in plain loops."""
    image, crop, drawn = batches.images[index].numpy(), batches.crop, batches.augmentation_params(view)
    channels, height, width = image.shape
    y0, x0, flips = int(drawn.y[index]), int(drawn.x[index]), bool(drawn.flip[index])
    out = torch.empty(channels, height, width)
    for c in range(channels):
        for y in range(height):
            for x in range(width):
                column = width - 1 - x if flips else x
                from_y, from_x = y + y0 - crop, column + x0 - crop
                inside = 0 <= from_y < height and 0 <= from_x < width
                pixel = torch.tensor(float(image[c, from_y, from_x]) if inside else 0.0)
                out[c, y, x] = (pixel / 255 - torch.tensor(batches.mean[c])) / torch.tensor(batches.std[c])
    return out


# pixels


@pytest.mark.parametrize("crop, flip", [(0, False), (2, False), (0, True), (3, True)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_augmentation_equals_a_slow_plain_one_bit_for_bit(crop: int, flip: bool, channels_last: bool) -> None:
    batches = made(9, batch_size=9, crop=crop, flip=flip, shuffle=True, channels_last=channels_last)
    batches.set_epoch(3)
    inputs, labels, ids = next(iter(batches))
    assert inputs.dtype == torch.float32
    assert inputs.is_contiguous(memory_format=torch.channels_last) == channels_last
    for x, y, i in zip(inputs, labels.tolist(), ids.tolist(), strict=True):
        assert torch.equal(x, slow(batches, i, view=3))
        assert y == i % 5


def test_offsets_and_flips_are_uniform_and_differ_by_view() -> None:
    drawn = made(6000, crop=2, flip=True).augmentation_params(0)
    for part, values in ((drawn.y, 5), (drawn.x, 5), (drawn.flip.long(), 2)):
        share = torch.bincount(part, minlength=values) / 6000
        assert len(share) == values
        assert (share - 1 / values).abs().max() < 0.02
    other = made(6000, crop=2, flip=True).augmentation_params(1)
    assert ((drawn.y == other.y) & (drawn.x == other.x) & (drawn.flip == other.flip)).float().mean() < 0.05
    together = torch.stack((drawn.y.double(), drawn.x.double(), drawn.flip.double()))
    assert (torch.corrcoef(together) - torch.eye(3)).abs().max() < 0.05


def test_what_is_drawn_never_changes_between_versions() -> None:
    # recorded caches are replayed by it: these numbers are a promise
    drawn = made(6, crop=4, flip=True, seed=7).augmentation_params(2)
    assert drawn.y.tolist() == PROMISED["y"]
    assert drawn.x.tolist() == PROMISED["x"]
    assert drawn.flip.long().tolist() == PROMISED["flip"]
    batches = made(6, batch_size=6, shuffle=True, seed=7)
    assert next(iter(batches))[2].tolist() == PROMISED["order"]


# order, epochs, ids


def test_an_epoch_is_a_function_of_seed_and_epoch_and_touches_no_global_generator() -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    batches = made(crop=2, flip=True, shuffle=True, seed=3)

    def epoch(number: int, of: Batches = batches) -> tuple[torch.Tensor, torch.Tensor]:
        of.set_epoch(number)
        parts = list(of)
        return torch.cat([x for x, _, _ in parts]), torch.cat([i for _, _, i in parts])

    x0, i0 = epoch(0)
    x1, i1 = epoch(1)
    assert torch.equal(i0.sort().values, torch.arange(50))
    assert not torch.equal(i0, i1)
    assert not torch.equal(x0[i0.argsort()], x1[i1.argsort()])
    again, _ = epoch(0)
    assert torch.equal(again, x0)
    other, _ = epoch(0, made(crop=2, flip=True, shuffle=True, seed=4))
    assert not torch.equal(other, x0)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.random.get_state()[1].tolist() == numpy_before


@pytest.mark.parametrize("start", [0, 1, 5, 6, 7, 9])
def test_iterate_begins_anywhere_with_the_same_batches(start: int) -> None:
    batches = made(crop=2, flip=True, shuffle=True)
    whole, rest = list(batches), list(batches.iterate(start))
    assert len(whole) == len(batches) == 7
    assert len(rest) == max(0, 7 - start)
    for expected, got in zip(whole[start:], rest, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_a_walk_keeps_the_epoch_it_began_with() -> None:
    batches = made(shuffle=True)
    expected = torch.cat([i for _, _, i in batches])
    walk = iter(batches)
    batches.set_epoch(1)
    assert torch.equal(torch.cat([i for _, _, i in walk]), expected)


def test_drop_last_leaves_the_short_batch_out() -> None:
    assert [len(y) for _, y, _ in made(20, drop_last=True)] == [8, 8]
    assert [len(y) for _, y, _ in made(20)] == [8, 8, 4]
    assert len(made(20, drop_last=True).clean()) == 3


def test_recorded_views_repeat_and_number_their_ids() -> None:
    batches = made(crop=2, flip=True, shuffle=True).replay(3)
    assert batches.rows == 150
    seen = []
    for epoch in range(4):
        batches.set_epoch(epoch)
        parts = list(batches)
        ids = torch.cat([i for _, _, i in parts])
        order = ids.argsort()
        assert torch.equal(ids[order], (epoch % 3) * 50 + torch.arange(50))
        seen.append((torch.cat([x for x, _, _ in parts])[order], ids))
    assert torch.equal(seen[0][0], seen[3][0])
    assert not torch.equal(seen[0][0], seen[1][0])
    assert not torch.equal(seen[0][1], seen[3][1])  # the order is the epoch's all the same


def test_at_gives_any_sample_as_the_walk_shows_it() -> None:
    batches = made(crop=2, flip=True, shuffle=True, channels_last=True).replay(3)
    batches.set_epoch(4)
    inputs, labels, ids = list(batches)[2]
    again, same_labels, same_ids = made(crop=2, flip=True).replay(3).gather(ids)
    assert torch.equal(again, inputs)
    assert torch.equal(same_labels, labels)
    assert torch.equal(same_ids, ids)
    mixed = torch.tensor([149, 0, 70, 20, 120])
    assert torch.equal(batches.gather(mixed)[0][3], batches.gather(mixed[3:4])[0][0])
    without = made(crop=2, flip=True)
    without.set_epoch(2)
    assert torch.equal(without.gather(torch.tensor([7]))[0][0], slow(without, 7, view=2))
    with pytest.raises(ValueError, match=r"ids must be in \[0, 150\); got 3 to 150"):
        batches.gather(torch.tensor([3, 150]))


# copies


def test_clean_is_whole_ordered_and_not_augmented() -> None:
    batches = made(crop=2, flip=True, shuffle=True, views=2, drop_last=True)
    clean = batches.clean()
    assert torch.equal(torch.cat([i for _, _, i in clean]), torch.arange(50))
    first = next(iter(clean))[0]
    clean.set_epoch(1)
    assert torch.equal(next(iter(clean))[0], first)
    assert torch.equal(first[0], slow(clean, 0, view=0))
    assert clean.augmentation == {"crop": 0, "flip": False, "seed": None, "views": None}
    assert batches.augmentation == {"crop": 2, "flip": True, "seed": 0, "views": 2}
    assert batches.crop == 2  # the original is as it was


@pytest.mark.parametrize("n", [48, 50])  # 50 leaves a last batch of 2 images
@pytest.mark.parametrize("world", [2, 4])
def test_the_shards_of_a_step_are_the_step(world: int, n: int) -> None:
    whole = made(n, crop=2, flip=True, shuffle=True, views=2)
    shards = [whole.shard(rank, world) for rank in range(world)]
    for of in (whole, *shards):
        of.set_epoch(1)
    steps = n // 8 + (n % 8 >= world)
    assert {len(shard) for shard in shards} == {steps}
    walked = 0
    for expected, *parts in zip(whole, *shards, strict=False):
        for field, value in enumerate(expected):
            assert torch.equal(torch.cat([part[field] for part in parts]), value)
        assert min(len(part[1]) for part in parts) >= 1
        walked += 1
    assert walked == steps
    assert shards[0].identity == whole.identity


def test_shard_refuses_what_does_not_divide() -> None:
    with pytest.raises(ValueError, match=r"batch_size=8 .* 3 processes .* such as batch_size=9"):
        made().shard(0, 3)
    with pytest.raises(ValueError, match="rank 2"):
        made().shard(2, 2)


def test_split_and_take_keep_classes_in_proportion() -> None:
    batches = made(60, crop=2, flip=True, shuffle=True)
    train, held = batches.split(15, seed=0)
    assert torch.bincount(held.labels).tolist() == [3] * 5
    assert torch.bincount(train.labels).tolist() == [9] * 5
    assert not held.augmented and not held.shuffle and train.augmented
    pixels = {image.numpy().tobytes() for part in (train, held) for image in part.images}
    assert len(pixels) == 60
    assert torch.equal(batches.split(15, seed=0)[1].images, held.images)
    assert not torch.equal(batches.split(15, seed=1)[1].images, held.images)
    few = batches.subset(12)
    assert torch.bincount(few.labels).tolist() == [3, 3, 2, 2, 2]
    assert torch.equal(few.images, batches.images[:12])  # classes go round here, so that is the beginning
    assert few.identity != batches.identity
    for wrong in (0, 60):
        with pytest.raises(ValueError, match=f"cannot hold out {wrong} of 60 images"):
            batches.split(wrong)
    with pytest.raises(ValueError, match="cannot take 61 of 60 images"):
        batches.subset(61)


def test_a_rare_class_is_split_in_proportion_too() -> None:
    labels = torch.tensor([0] * 90 + [1] * 10)
    batches = Batches(torch.zeros(100, 1, 2, 2, dtype=torch.uint8), labels, batch_size=4, mean=(0.0,), std=(1.0,))
    train, held = batches.split(20)
    assert torch.bincount(held.labels).tolist() == [18, 2]
    assert torch.bincount(train.labels).tolist() == [72, 8]


def test_identity_is_of_pixels_labels_and_scale_alone() -> None:
    base = made()
    assert len(base.identity) == 64
    for same in (made(crop=2, flip=True, seed=9, batch_size=4), base.clean(), base.to("cpu"), made().replay(2)):
        assert same.identity == base.identity
    pixels, labels = base.images.clone(), base.labels.clone()
    pixels[3, 0, 0, 0] ^= 1
    labels[3] = 0
    scale = {"batch_size": 8, "mean": MEAN, "std": STD}
    others = [
        Batches(pixels, base.labels, **scale),
        Batches(base.images, labels, **scale),
        Batches(base.images, base.labels, batch_size=8, mean=MEAN, std=(0.25, 0.25, 0.25)),
        Batches(base.images.mT.contiguous(), base.labels, **scale),
    ]
    assert len({other.identity for other in others} | {base.identity}) == 5


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"images": torch.zeros(4, 3, 2, 2)},
            r"images \(N, C, H, W\) in uint8, N > 0; got .* torch.float32",
        ),
        ({"images": torch.zeros(0, 3, 2, 2, dtype=torch.uint8)}, "N > 0"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels \(N,\) = \(4,\) in int64; got \(3,\)"),
        ({"labels": torch.zeros(4, dtype=torch.int32)}, r"Other integers: labels.long\(\)"),
        ({"labels": torch.full((4,), 2), "class_names": ["a", "b"]}, "label 2 has no name: there are 2 class_names"),
        ({"mean": (0.5,)}, "a mean and a std > 0 for each of 3 channels"),
        ({"std": (0.5, 0.0, 0.5)}, "std > 0"),
        ({"batch_size": 0}, "batch_size >= 1; got 0"),
        ({"crop": -1}, "crop >= 0; got -1"),
        ({"views": 0}, "views >= 1; got 0"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    good = {
        "images": torch.zeros(4, 3, 2, 2, dtype=torch.uint8),
        "labels": torch.zeros(4, dtype=torch.int64),
        "batch_size": 2,
        "mean": MEAN,
        "std": STD,
    }
    with pytest.raises(ValueError, match=message):
        Batches(**{**good, **change})
    with pytest.raises(ValueError, match="needs start >= 0; got -1"):
        Batches(**good).iterate(-1)


# sources


def test_importing_data_imports_no_reader() -> None:
    code = "import sys, tempering.data; print([m for m in ('sklearn', 'PIL', 'datasets') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_digits_are_split_once_and_for_all() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn holds the digits")
    splits = digits(batch_size=100, seed=3, crop=1)
    assert [part.size for part in splits if part is not None] == [1078, 359, 360]
    assert splits.train.images.shape[1:] == (1, 8, 8)
    assert int(splits.train.images.max()) == 255
    every = torch.cat([part.images for part in splits if part is not None]).float() / 255
    assert abs(float(every.mean()) - splits.train.mean[0]) < 1e-4
    assert abs(float(every.std()) - splits.train.std[0]) < 1e-4
    share = torch.bincount(splits.test.labels) / 360
    whole = torch.bincount(torch.cat([part.labels for part in splits if part is not None])) / 1797
    assert (share - whole).abs().max() < 0.01
    other = digits(seed=8)
    assert other.test.identity == splits.test.identity
    assert other.train.identity == splits.train.identity
    facts = splits.facts()
    assert facts["name"] == "digits" and facts["classes"] == 10 and facts["validation"] == 359
    assert facts["identity"] == splits.train.identity
    assert splits.train.class_names == tuple("0123456789")


def write_images(folder: Path, classes: dict[str, int], *, wide: int = 12) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow writes the images")
    for label, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            picture = np.full((8, wide, 3), 40 * label + i, np.uint8)
            picture[:, 0] = 255  # cut off by the square
            image.fromarray(picture).save(folder / name / f"{i}.png")


def test_image_folders_with_and_without_splits(tmp_path: Path) -> None:
    write_images(tmp_path / "flat", {"cat": 6, "dog": 6})
    (tmp_path / "flat" / "cat" / "notes.txt").write_text("no image")
    splits = image_folder(tmp_path / "flat", size=4, batch_size=3, validation=2, test=4, flip=True)
    assert [part.size for part in splits if part is not None] == [6, 2, 4]
    assert splits.train.class_names == ("cat", "dog") and splits.train.name == "flat"
    assert splits.train.flip and not splits.test.flip
    assert torch.bincount(splits.test.labels).tolist() == [2, 2]
    values = {int(image.float().mean().round()) - 40 * int(y) for image, y in zip(*_all(splits), strict=True)}
    assert values == {0, 1, 2, 3, 4, 5}
    inputs, _, _ = next(iter(splits.train))
    assert inputs.shape == (3, 3, 4, 4)

    write_images(tmp_path / "two" / "train", {"cat": 3, "dog": 3})
    write_images(tmp_path / "two" / "val", {"cat": 1, "dog": 1})
    splits = image_folder(tmp_path / "two", size=4)
    assert splits.validation is None and splits.test.size == 2
    write_images(tmp_path / "two" / "test", {"cat": 2, "dog": 2})
    splits = image_folder(tmp_path / "two", size=4)
    assert splits.validation is not None and splits.validation.size == 2 and splits.test.size == 4
    with pytest.raises(ValueError, match=r"two has its own validation split \(2 images\): leave out validation="):
        image_folder(tmp_path / "two", size=4, validation=1)


def _all(splits: Splits) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [part for part in splits if part is not None]
    return torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts])


def test_image_folders_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        image_folder(tmp_path / "nowhere", size=4)
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"holds classes but no images. Expected .jpg"):
        image_folder(tmp_path / "empty", size=4)
    write_images(tmp_path / "flat", {"cat": 2, "dog": 2})
    with pytest.raises(ValueError, match=r"flat has no test split.*test=N"):
        image_folder(tmp_path / "flat", size=4)
    (tmp_path / "flat" / "dog" / "9.jpg").write_bytes(b"no jpeg")
    with pytest.raises(ValueError, match=r"9.jpg cannot be read as an image"):
        image_folder(tmp_path / "flat", size=4, test=1)
    write_images(tmp_path / "other" / "train", {"cat": 2, "dog": 2})
    write_images(tmp_path / "other" / "test", {"cat": 2, "cow": 2})
    with pytest.raises(FileNotFoundError, match=r"one folder per class, the same as .*train; it holds cat, cow"):
        image_folder(tmp_path / "other", size=4)


def test_copies_that_programs_keep_in_image_folders_are_skipped(tmp_path: Path) -> None:
    write_images(tmp_path, {"cat": 4, "dog": 4})
    for copied in ("cat/.ipynb_checkpoints", "dog/__MACOSX", "dog/deep/.thumbnails", "__MACOSX", ".cache"):
        write_images(tmp_path, {copied: 1})
    (tmp_path / "cat" / "._0.png").write_bytes(b"an AppleDouble header")
    splits = image_folder(tmp_path, size=4, test=2)
    assert splits.train.class_names == ("cat", "dog") and splits.train.size + splits.test.size == 8


def test_images_of_too_many_pixels_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pillow = pytest.importorskip("PIL.Image")
    write_images(tmp_path, {"cat": 2, "dog": 2})
    monkeypatch.setattr(pillow, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(ValueError, match=r"\.png has too many pixels: .*MAX_IMAGE_PIXELS"):
        image_folder(tmp_path, size=4, test=2)


class Image:
    """A stand-in for datasets.Image; the loader goes by the feature's type name."""


class ClassLabel:
    names = ("cat", "dog")


class Table:
    """As much of datasets.Dataset as the loader uses."""

    def __init__(self, n: int, columns: tuple[str, str] = ("picture", "kind")) -> None:
        image = pytest.importorskip("PIL.Image", reason="Pillow makes the images")
        self.features = dict(zip(columns, (Image(), ClassLabel()), strict=True))
        self.columns = {
            columns[0]: [image.fromarray(np.full((5, 7), i, np.uint8)) for i in range(n)],
            columns[1]: [i % 2 for i in range(n)],
        }

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, column: str) -> list:
        return self.columns[column]

    def __iter__(self):
        names = list(self.columns)
        return (dict(zip(names, row, strict=True)) for row in zip(*self.columns.values(), strict=True))


def test_hugging_face_columns_are_found_by_type() -> None:
    splits = hugging_face({"train": Table(8), "test": Table(4)}, size=4, batch_size=2, validation=2)
    assert [part.size for part in splits if part is not None] == [6, 2, 4]
    assert splits.train.class_names == ("cat", "dog")
    assert torch.equal(splits.test.images[3], torch.full((3, 4, 4), 3, dtype=torch.uint8))
    assert splits.test.labels.tolist() == [0, 1, 0, 1]
    assert hugging_face(Table(8), size=4, test=2).train.size == 6
    with pytest.raises(ValueError, match=r"there is no column 'img'; there are picture, kind. Name it: image=..."):
        hugging_face(Table(8), size=4, image="img", test=2)
    with pytest.raises(ValueError, match="has the splits test; one must be called train"):
        hugging_face({"test": Table(4)}, size=4)
    with pytest.raises(FileNotFoundError, match="no data set in nowhere"):
        hugging_face("nowhere", size=4)


def test_hugging_face_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra tempering[datasets] is not installed")
    image = pytest.importorskip("PIL.Image")
    pictures = [image.fromarray(np.full((6, 6, 3), i, np.uint8)) for i in range(6)]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = datasets.Dataset.from_dict({"img": pictures, "label": [0, 1] * 3}, features=features)
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "set")
    splits = hugging_face(tmp_path / "set", size=4)
    assert splits.train.name == "set" and splits.train.class_names == ("a", "b")
    assert torch.equal(splits.test.images[5], torch.full((3, 4, 4), 5, dtype=torch.uint8))
