"""Images that are decoded when they are needed: the pixels, the order, resuming, shards, streams, broken files."""

from __future__ import annotations

import importlib.util
import io
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tempering.data import (
    Batches,
    LazyBatches,
    Splits,
    image_folder,
    lazy_hugging_face,
    lazy_image_folder,
    open_images,
    webdataset,
)
from tempering.data.decoding import Decoding, random_box
from tempering.models.external_detectors import torchvision
from tempering.teachers import Live, record
from tempering.training.config import Run
from tempering.training.distill import distill
from tempering.training.fabric import fabric_for
from tempering.training.resumable_loader import ResumableLoader
from tests.runs import identical, stop_at

Image = pytest.importorskip("PIL.Image", reason="Pillow makes the images")
SIZE, N = 8, 40


def jpeg(i: int, *, exif: int | None = None) -> bytes:
    """An image of 20 to 60 pixels a side, brighter for the second class."""
    drawn = np.random.default_rng(i)
    cells = drawn.integers(64, size=(4, 4, 3), dtype=np.uint8) + np.uint8(120 * (i % 2))
    sides = tuple(int(side) for side in drawn.integers(20, 60, size=2))
    out, tags = io.BytesIO(), Image.Exif()
    if exif is not None:
        tags[274] = exif
    Image.fromarray(cells).resize(sides, Image.Resampling.BICUBIC).save(out, "JPEG", quality=95, exif=tags)
    return out.getvalue()


def shard(path: Path, numbers: range, *, label: str = "cls", **change: bytes) -> None:
    with tarfile.open(path, "w") as tar:
        for i in numbers:
            for name, content in ({"jpg": jpeg(i), label: str(i % 2).encode()} | change).items():
                info = tarfile.TarInfo(f"some/{i:04d}.{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images by class in train and val, and the training images in four shards, ten images each."""
    root = tmp_path_factory.mktemp("images")
    for i in range(N + 8):
        file = root / ("train" if i < N else "val") / ("cat", "dog")[i % 2] / f"{i:02d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(jpeg(i))
    (root / "shards").mkdir()
    for number in range(4):
        shard(root / "shards" / f"train-{number:03d}.tar", range(10 * number, 10 * number + 10))
    shard(root / "shards" / "val-000.tar", range(N, N + 8))
    return root


def lazily(folder: Path, **more: Any) -> Splits[LazyBatches]:
    return lazy_image_folder(folder, **{"size": SIZE, "batch_size": 8, "workers": 0, **more})


def same(ours: Any, theirs: Any) -> bool:
    """Whether two iterables have the same batches, to the bit."""
    return identical([tuple(batch) for batch in ours], [tuple(batch) for batch in theirs])


# pixels


def test_crops_and_clean_images_equal_torchvisions_to_the_bit(library: Any) -> None:
    from torchvision import transforms  # pyright: ignore[reportMissingImports]
    from torchvision.transforms import functional  # pyright: ignore[reportMissingImports]

    clean = transforms.Compose([transforms.Resize(9), transforms.CenterCrop(SIZE)])
    for i in range(6):
        content = jpeg(i)
        image = Image.open(io.BytesIO(content)).convert("RGB")
        assert np.array_equal(Decoding(SIZE, 9)(content, None, i), np.asarray(clean(image)))
        left, top, right, bottom = random_box(image.size, (0.08, 1.0), (3 / 4, 4 / 3), random.Random(77 + i))
        cropped = functional.resized_crop(image, top, left, bottom - top, right - left, [SIZE, SIZE])
        drawn = Decoding(SIZE, 9, scale=(0.08, 1.0), draft=False)(content, 77 + i, i)
        assert np.array_equal(drawn, np.asarray(cropped))


@pytest.fixture
def library() -> Any:
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("the extra tempering[models] is not installed")
    return torchvision()


def test_what_is_drawn_of_a_crop_never_changes_between_versions() -> None:
    # recorded caches of augmented images are replayed by it: these numbers are a promise
    drawn = random.Random(7)
    boxes = [random_box((60, 40), (0.08, 1.0), (3 / 4, 4 / 3), drawn) for _ in range(3)]
    assert boxes == PROMISED
    shares = [(r - x) * (b - y) / 2400 for x, y, r, b in (random_box((60, 40), (0.2, 0.5), (1, 1), drawn),) * 1]
    assert 0.19 < shares[0] < 0.52
    assert random_box((100, 10), (0.9, 1.0), (1, 1), drawn) == (45, 0, 55, 10), "none fits: the largest in the center"


PROMISED = [(22, 0, 49, 33), (1, 1, 37, 40), (3, 2, 19, 19)]


def test_flips_turned_images_drafts_and_modes() -> None:
    content, word = jpeg(3), 2**62 + 12345
    plain = Decoding(SIZE, 9, scale=(0.3, 1.0), flip=True, draft=False)
    flipped = plain(content, word - 2**63, 0)  # the sign is the flip's
    assert not np.array_equal(flipped, plain(content, word, 0))
    left, top, right, bottom = random_box(
        Image.open(io.BytesIO(content)).size, (0.3, 1.0), (3 / 4, 4 / 3), random.Random((word - 2**63) % 2**64)
    )
    part = Image.open(io.BytesIO(content)).crop((left, top, right, bottom)).resize((SIZE, SIZE), 2)
    assert np.array_equal(flipped, np.asarray(part)[:, ::-1])
    coarse = Decoding(SIZE, 9, scale=(0.9, 1.0))(content, word, 0).astype(int)
    fine = Decoding(SIZE, 9, scale=(0.9, 1.0), draft=False)(content, word, 0).astype(int)
    assert 0 < np.abs(coarse - fine).mean() < 3, "a JPEG of twice the size is decoded at half of it"
    turned = io.BytesIO()
    Image.open(io.BytesIO(content)).transpose(Image.Transpose.ROTATE_180).save(turned, "PNG")
    for decoding in (Decoding(SIZE, 9), plain):
        upright = decoding(turned.getvalue(), word, 0)
        assert np.array_equal(decoding(jpeg(3, exif=3), word, 0), upright), "by its EXIF data"
    out = io.BytesIO()
    Image.fromarray(np.full((12, 20), 300 * 100, np.uint16)).save(out, "PNG")
    assert set(Decoding(SIZE, 9)(out.getvalue(), None, 0).ravel()) == {30000 // 256}


# order, ids, resuming


def test_order_ids_and_splits_are_those_of_images_in_memory(folder: Path) -> None:
    lazy = lazily(folder, validation=8, seed=3)
    held = image_folder(folder, size=SIZE, validation=8, batch_size=8, seed=3)
    assert [part and part.size for part in lazy] == [part and part.size for part in held] == [32, 8, 8]
    for ours, theirs in zip(lazy, held, strict=True):
        assert ours is not None and theirs is not None
        assert torch.equal(ours.labels, theirs.labels) and ours.class_names == theirs.class_names == ("cat", "dog")
        for loader in (ours, theirs):
            loader.set_epoch(2)
        assert [i.tolist() for _, _, i in ours] == [i.tolist() for _, _, i in theirs]
    assert lazy.test.augmentation == {"scale": None, "flip": False, "seed": None, "views": None}
    inputs, labels, _ = next(iter(lazy.test))
    assert inputs.shape == (8, 3, SIZE, SIZE) and inputs.is_contiguous()
    assert inputs[labels == 1].mean() > inputs[labels == 0].mean() + 1


def test_any_start_and_any_number_of_workers_give_the_same_bits(folder: Path) -> None:
    before = torch.get_rng_state()
    loader, other = (lazily(folder, batch_size=7, channels_last=True, workers=n).train for n in (0, 2))
    for each in (loader, other):
        each.set_epoch(1)
    whole = list(loader)
    assert whole[0][0].is_contiguous(memory_format=torch.channels_last) and len(whole) == len(loader) == 6
    assert same(whole[3:], other.iterate(3))
    assert same([whole[2]], [loader.gather(whole[2][2])])
    assert not same(whole, loader._replace(seed=1)) and not same(whole, loader._replace(epoch=0))
    parts = [list(loader._replace(batch_size=6).shard(rank, 2)) for rank in (0, 1)]
    both = [torch.cat(pair) for pair in zip(*([b[0] for b in part] for part in parts), strict=True)]
    assert torch.equal(torch.cat(both), torch.cat([b[0] for b in whole]))
    assert torch.equal(torch.get_rng_state(), before)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 2))


def trained(data: Any, out: Path | None, *, stop: int | None = None) -> Run:
    """20 steps; with ``stop`` interrupted there."""
    how: dict[str, Any] = {"steps": 20, "quiet": True, "selfcheck": False, "accelerator": "cpu", "checkpoint_every": 5}
    how["on_step"] = None if stop is None else stop_at(stop)
    return distill(net(), None, data, method="supervised", out=out, **how)


def resumed_equals_whole(make: Any, tmp_path: Path) -> Run:
    whole = trained(make(), None)
    with pytest.raises(KeyboardInterrupt):
        trained(make(), tmp_path / "run", stop=10)
    rest = trained(make(), tmp_path / "run")
    assert rest.how == "resumed" and rest.facts["resumed"] == [10]
    assert identical(dict(whole.student.state_dict()), dict(rest.student.state_dict()))
    return rest


def test_a_run_resumes_in_mid_epoch_with_workers(folder: Path, tmp_path: Path) -> None:
    resumed_equals_whole(lambda: lazily(folder, batch_size=2, workers=2).train, tmp_path)


# caches


@pytest.mark.parametrize("views", [None, 2])
def test_a_teacher_is_cached(views: int | None, folder: Path, tmp_path: Path) -> None:
    train = lazily(folder).train
    live = Live(net())
    cached = record(live, train, tmp_path / "cache", views=views, precision="fp32", quiet=True)
    train = train.clean() if views is None else train.replay(views)
    train.set_epoch(1)
    inputs, _, ids = list(train)[2]
    assert torch.allclose(cached(inputs, ids), live(inputs, ids), atol=1e-5)
    assert int(ids.max()) >= (0 if views is None else N)


def test_the_identity_is_that_of_content_not_of_place(folder: Path, tmp_path: Path) -> None:
    def copied(name: str, **changed: bytes) -> str:
        for i in range(4):
            file = tmp_path / name / ("cat", "dog")[i % 2] / f"{i}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(changed.get(f"_{i}", jpeg(i)))
        return lazily(tmp_path / name, test=2).train.identity

    assert copied("one") == copied("two", _0=jpeg(0)) != copied("three", _0=jpeg(8), _1=jpeg(9), _2=jpeg(10))
    train = lazily(folder).train
    assert train.identity == train.clean().identity != lazily(folder, size=4).train.identity
    assert train.identity != train.subset(20).identity and torch.bincount(train.subset(20).labels).tolist() == [10, 10]


# images that cannot be read


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_images_are_named_or_left_out(workers: int, tmp_path: Path) -> None:
    for i in range(12):
        file = tmp_path / ("cat", "dog")[i % 2] / f"{i:02d}.jpg"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(jpeg(i)[: 200 if i == 5 else None] if i else b"no jpeg")
    strict = lazily(tmp_path, test=2, workers=workers, batch_size=5).train._replace(shuffle=False)
    broken = r"^\S*00.jpg cannot be read as an image .*on_error='skip' leaves such"
    with pytest.raises(ValueError, match=broken) as error:
        list(strict)
    assert "Traceback" not in str(error.value)
    lenient = strict._replace(on_error="skip")
    with pytest.warns(UserWarning, match=r"2 images of this epoch could not .* left out. The first: \S*00"):
        batches = list(lenient)
    assert sum(len(ids) for *_, ids in batches) == lenient.size - 2
    for inputs, labels, ids in batches:
        assert len(inputs) == len(labels) == len(ids) and torch.equal(labels, lenient.labels[ids])
    with pytest.raises(ValueError, match=r"00.jpg cannot be read"):
        lenient.gather(torch.arange(3))
    with pytest.raises(ValueError, match=r"00.jpg cannot be read"):
        list(lenient.subset(lenient.size)._replace(batch_size=1))  # a batch of broken ones alone


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"resize": 4}, r"1 <= size <= resize, in pixels; got size=8 and resize=4"),
        ({"scale": (0.5, 0.1)}, r"scale=\(low, high\) with 0 < low <= high <= 1"),
        ({"ratio": (0, 1)}, r"ratio=\(low, high\) with 0 < low"),
        ({"on_error": "ignore"}, "on_error='raise' or 'skip'; got 'ignore'"),
        ({"workers": -1}, "workers must be 0 or more; got -1"),
        ({"batch_size": 0}, "LazyBatches needs batch_size >= 1"),
    ],
)
def test_bad_arguments_are_named(wrong: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        lazily(folder, **wrong)


def test_a_folder_larger_than_the_memory_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sysconf", lambda name: 64, raising=False)
    with pytest.raises(ValueError, match=r"40 images of 224 x 224 pixels take .* data.lazy_image_folder\(folder"):
        image_folder(folder, size=224)


# shards


def test_shards_are_read_at_random_by_key(folder: Path) -> None:
    shards, files = open_images(folder / "shards", size=SIZE, batch_size=8, workers=0), lazily(folder)
    assert isinstance(shards.train, LazyBatches) and shards.train.classes == 2 and shards.test.size == 8
    order = torch.tensor([int(shards.train.source.name(i)[-4:]) for i in range(N)])
    assert torch.equal(order, torch.arange(N)) and torch.equal(shards.train.labels, order % 2)
    ours, theirs = shards.train.clean().gather(order), files.train.clean()
    place = [int(files.train.source.name(i)[-6:-4]) for i in range(N)]
    assert torch.equal(ours[0][place], theirs.gather(torch.arange(N))[0])
    assert shards.train.identity != shards.test.identity and shards.train.name == "train"


def test_shards_that_cannot_be_read_say_why(folder: Path, tmp_path: Path) -> None:
    def opened(**more: Any) -> Any:
        return webdataset({"train": [tmp_path / "a.tar"], "test": [tmp_path / "a.tar"]}, size=SIZE, **more)

    with pytest.raises(FileNotFoundError, match=r"no file \S*a.tar. Addresses and pipes are streamed: give length="):
        opened()
    (tmp_path / "a.tar").write_bytes(b"x" * 600)
    with pytest.raises(ValueError, match=r"a.tar cannot be read as a tar file .*compressed can be streamed"):
        opened()
    shard(tmp_path / "a.tar", range(2), label="json")
    with pytest.raises(ValueError, match=r"a.tar: some/0000 has no member cls; it has jpg, json. Name those"):
        opened()
    shard(tmp_path / "a.tar", range(2), cls=b"cat")
    with pytest.raises(ValueError, match=r"some/0000: the label should be the number of a class, as text; got b'cat'"):
        opened()
    with pytest.raises(ValueError, match="do not say how many classes there are: give classes="):
        opened(length=20)
    with pytest.raises(ValueError, match="one must be called train"):
        webdataset({"test": folder / "shards"}, size=SIZE)


# streams


@pytest.fixture(params=["shards", "pipes", "hugging face"])
def streamed(request: pytest.FixtureRequest, folder: Path) -> Any:
    """A function that opens a stream of 40 images in four parts."""
    options: dict[str, Any] = {"size": SIZE, "batch_size": 3, "workers": 2, "length": N}
    if request.param == "hugging face":
        datasets = pytest.importorskip("datasets", reason="the extra tempering[datasets] is not installed")
        pictures = [{"bytes": jpeg(i), "path": None} for i in range(N + 8)]
        columns = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])})
        rows = {"picture": pictures, "kind": [i % 2 for i in range(N + 8)]}
        table = datasets.Dataset.from_dict(rows, features=columns)
        parts = {"train": table.select(range(N)), "validation": table.select(range(N, N + 8))}
        return lambda **more: lazy_hugging_face(
            {name: part.to_iterable_dataset(num_shards=4) for name, part in parts.items()}, **{**options, **more}
        )
    pytest.importorskip("webdataset", reason="the extra tempering[images] is not installed")
    place = f"{'pipe:cat ' if request.param == 'pipes' else ''}{folder}/shards/"
    shards = {"train": place + "train-{000..003}.tar", "val": place + "val-000.tar"}
    return lambda **more: webdataset(shards, classes=2, **{**options, **more})


def test_a_stream_starts_anywhere_and_a_run_of_it_resumes(streamed: Any, tmp_path: Path) -> None:
    splits = streamed()
    train = splits.train
    whole = list(train)
    assert len(whole) == len(train) == N // 3 == 13 and train.size == 39
    assert all(inputs.shape == (3, 3, SIZE, SIZE) for inputs, _ in whole)
    assert same(whole[5:], train.iterate(5)) and not same(whole, train._replace(epoch=1))
    for inputs, labels in whole:
        bright = inputs.mean((1, 2, 3))
        assert (bright[labels == 1] > -0.9).all() and (bright[labels == 0] < -0.5).all(), "labels go with their images"
    labels = torch.cat([labels for _, labels in splits.test])
    assert sorted(labels.tolist()) == [0] * 4 + [1] * 4, "every image that is scored comes once"
    resumed_equals_whole(lambda: streamed().train, tmp_path)


def test_what_a_stream_cannot_do_is_named(streamed: Any, tmp_path: Path) -> None:
    splits = streamed(workers=0)
    with pytest.raises(TypeError, match="a recording needs samples with ids and an identity, which StreamedImages"):
        record(Live(net()), splits.train, tmp_path / "cache")
    with pytest.raises(ValueError, match="no images can be held out of its training split"):
        streamed(validation=8)
    with pytest.raises(ValueError, match=r"needs the number of its samples per epoch.*got length=2"):
        streamed(length=2)
    with pytest.raises(ValueError, match=r"cannot be split over 5 processes"):
        splits.train.shard(0, 5)
    with pytest.raises(TypeError, match="number of batches of a stream that is read once is not known"):
        len(splits.test)
    with pytest.raises(ValueError, match="balanced_sampling="):
        distill(net(), None, splits.train, method="supervised", epochs=1, quiet=True, balanced_sampling=True)


def test_each_rank_of_a_stream_reads_its_own_shards(streamed: Any) -> None:
    ranks = [streamed(batch_size=4, workers=1).train.shard(rank, 2) for rank in (0, 1)]
    seen = [torch.cat([inputs for inputs, _ in loader]) for loader in ranks]
    assert [len(each) for each in seen] == [20, 20]
    assert not any(torch.equal(x, y) for x in seen[0] for y in seen[1])


# loaders of others that have a state


class Counted(IterableDataset[tuple[Tensor, Tensor]]):
    """Numbers, of each worker its own, that continue from a state."""

    def __init__(self) -> None:
        self.at = self.begin = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        worker = info.id if (info := get_worker_info()) is not None else 0
        self.at, self.begin = self.begin, 0
        while self.at < 60:
            self.at += 1
            yield torch.full((3, SIZE, SIZE), 0.01 * self.at + worker), torch.tensor(self.at % 2)

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.begin = state["at"]


class Stateful(DataLoader[Any]):
    """As much of torchdata's StatefulDataLoader as one process needs."""

    dataset: Any

    def state_dict(self) -> dict[str, Any]:
        return {"data": self.dataset.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.dataset.load_state_dict(state["data"])


@pytest.mark.parametrize("kind", ["one process", "torchdata"])
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
def test_a_loader_with_a_state_continues_from_it(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []
    made: Any = Stateful
    if kind == "torchdata":
        made = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    before = made.load_state_dict
    monkeypatch.setattr(made, "load_state_dict", lambda self, state: loaded.append(state) or before(self, state))
    resumed_equals_whole(lambda: made(Counted(), batch_size=4, num_workers=2 * (kind == "torchdata")), tmp_path)
    assert len(loaded) == 1, "the batches before are not loaded again"


def test_a_state_that_leaves_something_out_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = Stateful(Counted(), batch_size=4)
    fabric = fabric_for(accelerator="cpu", devices=1, num_nodes=1, strategy="auto", precision="32-true")
    assert ResumableLoader(loader, fabric).state() == {"data": {"at": 0}}
    monkeypatch.setattr(Counted, "__module__", "datasets.iterable_dataset")  # its shuffle buffer is not in it
    assert ResumableLoader(loader, fabric).state() is None
    seekable = Batches(torch.zeros(4, 1, 2, 2).byte(), torch.zeros(4).long(), batch_size=2, mean=(0,), std=(1,))
    assert ResumableLoader(seekable, fabric).state() is None
