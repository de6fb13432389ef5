"""CIFAR-100 as it comes: packed blocks, and the official archive behind its checksum and the narrow unpickler."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tempering.data import cifar, cifar100
from tests import recipes
from tests.paths import SHARED, needs_shared
from tests.runs import left

PACKED = SHARED / "data" / "cifar100"
NAMES = [f"class_{i:02d}" for i in range(100)]


class AsPython2(pickle._Pickler):
    """Pickles as the published files were: protocol 2, every string a byte string of Python 2."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_string(self, value: str | bytes) -> None:
        data = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + len(data).to_bytes(4, "little") + data)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string

    def save_global(self, obj: Any, name: str | None = None) -> None:
        # Python 2 knew numpy's rebuilding function by this name
        module = obj.__module__.replace("numpy._core", "numpy.core")
        self.write(pickle.GLOBAL + f"{module}\n{name or obj.__qualname__}\n".encode())
        self.memoize(obj)

    dispatch[type(lambda: None)] = dispatch[type(len)] = dispatch[type] = save_global


def pickled(value: Any) -> bytes:
    file = io.BytesIO()
    AsPython2(file, 2).dump(value)
    return file.getvalue()


def official(n: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "filenames": [f"{i}.png" for i in range(n)],
        "batch_label": "batch 1 of 1",
        "fine_labels": [int(i) % 100 for i in rng.permutation(n)],
        "coarse_labels": [0] * n,
        "data": rng.integers(0, 256, (n, 3072), dtype=np.uint8),
    }


def write_official(folder: Path, monkeypatch: pytest.MonkeyPatch, **replaced: bytes) -> dict[str, Any]:
    """The extracted files and the archive, small, with the loader's checksums set to theirs."""
    parts = {"train": official(300, 0), "test": official(200, 1)}
    files = {name: pickled(part) for name, part in parts.items()}
    files["meta"] = pickled({"fine_label_names": NAMES, "coarse_label_names": ["thing"]})
    files |= replaced
    inner = folder / "cifar-100-python"
    inner.mkdir(parents=True)
    with tarfile.open(folder / cifar.ARCHIVE, "w:gz") as tar:
        for name, data in files.items():
            (inner / name).write_bytes(data)
            tar.add(inner / name, f"cifar-100-python/{name}")
    made = {**files, cifar.ARCHIVE: (folder / cifar.ARCHIVE).read_bytes()}
    monkeypatch.setattr(cifar, "MD5", {name: hashlib.md5(data).hexdigest() for name, data in made.items()})
    return parts


# the official files


@pytest.mark.parametrize("given", ["", "cifar-100-python.tar.gz", "cifar-100-python"])
def test_the_official_archive_is_read_in_every_form(given: str, tmp_path: Path, monkeypatch) -> None:
    parts = write_official(tmp_path, monkeypatch)
    if given == "cifar-100-python":
        (tmp_path / cifar.ARCHIVE).unlink()
    splits = cifar100(tmp_path / given, batch_size=10, validation=100)
    assert [part.size for part in splits if part is not None] == [200, 100, 200]
    assert splits.test.labels.tolist() == parts["test"]["fine_labels"]
    assert torch.equal(splits.test.images[7], torch.from_numpy(parts["test"]["data"][7]).view(3, 32, 32))
    assert splits.validation is not None
    assert torch.bincount(splits.validation.labels).tolist() == [1] * 100
    train, test = splits.train, splits.test
    assert train.class_names == tuple(NAMES)
    assert (train.crop, train.flip, train.shuffle) == (4, True, True)
    assert (test.crop, test.flip, test.shuffle) == (0, False, False)
    assert train.mean == cifar.MEAN and train.std == cifar.STD
    few = cifar100(tmp_path / given, subset=200, test_subset=100)
    assert torch.bincount(few.train.labels).tolist() == [2] * 100
    assert torch.bincount(few.test.labels).tolist() == [1] * 100


def test_the_published_checksums_are_asked_for_first(tmp_path: Path, monkeypatch) -> None:
    assert cifar.MD5[cifar.ARCHIVE] == "eb9058c3a382ffc7106e4002c42a8d85"
    published = dict(cifar.MD5)
    write_official(tmp_path, monkeypatch)
    monkeypatch.setattr(cifar, "MD5", published)
    monkeypatch.setattr(cifar, "_RestrictedUnpickler", None)  # whoever unpickles before the checksum falls over this
    with pytest.raises(ValueError, match=r"tar.gz has md5 [0-9a-f]{32}, and the published file eb9058.*curl -LO https"):
        cifar100(tmp_path)
    (tmp_path / cifar.ARCHIVE).unlink()
    with pytest.raises(ValueError, match=r"train has md5 .* and is not read"):
        cifar100(tmp_path)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_malicious_pickle_is_refused_and_does_nothing(protocol: int, tmp_path: Path, monkeypatch) -> None:
    struck = tmp_path / "struck"
    bad = pickle.dumps({"data": Malicious(struck), "fine_labels": []}, protocol=protocol)
    write_official(tmp_path / "set", monkeypatch, train=bad)
    with pytest.raises(ValueError, match=r"train contains (posix|nt).mkdir, which no array or plain container needs"):
        cifar100(tmp_path / "set")
    assert not struck.exists()


@pytest.mark.parametrize(
    "code", ["cnumpy\nload\n.", "cbuiltins\neval\n.", "cnumpy.core\nndarray.tofile\n.", "cio\nopen\n."]
)
def test_no_other_global_is_admitted(code: str, tmp_path: Path, monkeypatch) -> None:
    write_official(tmp_path, monkeypatch, meta=code.encode())
    with pytest.raises(ValueError, match="is not CIFAR-100 and is not read further"):
        cifar100(tmp_path)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        cifar100(tmp_path / "nowhere")
    for part in (
        "nowhere: it is not there",
        "meta.json, labels.npz",
        cifar.ARCHIVE,
        "train, test and meta",
        "curl -LO",
    ):
        assert part in str(caught.value)
    with pytest.raises(FileNotFoundError, match="holds none of these"):
        cifar100(tmp_path)
    with pytest.raises(ValueError, match="subset >= 1, or None for all; got 0"):
        cifar100(tmp_path, subset=0)


# packed blocks


def write_packed(folder: Path, *, train: int = 1000, test: int = 500) -> dict[str, np.ndarray]:
    image = pytest.importorskip("PIL.Image", reason="Pillow reads the blocks")
    rng = np.random.default_rng(0)
    labels, splits, held = {}, {}, {}
    for split, n in (("train", train), ("test", test)):
        held[split] = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        labels[f"{split}_labels"] = np.concatenate([rng.permutation(100) for _ in range(n // 100)]).astype(np.uint8)
        digest = hashlib.sha256(held[split].tobytes()).hexdigest()
        splits[split] = {"images": n, "sha256_uint8_NHWC": digest}
        for block in range(n // 500):
            part = held[split][500 * block : 500 * (block + 1)].reshape(-1, 32, 3)
            image.fromarray(part).save(folder / f"{split}_{block:03d}.webp", lossless=True, quality=0)
    np.savez(folder / "labels.npz", **labels)
    (folder / "meta.json").write_text(json.dumps({"class_names": NAMES, "splits": splits}))
    return held


def test_packed_blocks_are_read_and_only_those_needed(tmp_path: Path) -> None:
    held = write_packed(tmp_path)
    splits = cifar100(tmp_path, batch_size=16)
    assert splits.train.size == 1000 and splits.validation is None
    assert torch.equal(splits.train.images, torch.from_numpy(held["train"]).permute(0, 3, 1, 2))
    (tmp_path / "train_001.webp").unlink()
    few = cifar100(tmp_path, subset=300, validation=100)
    assert few.validation is not None
    assert torch.bincount(few.train.labels).tolist() == [2] * 100
    assert torch.bincount(few.validation.labels).tolist() == [1] * 100
    assert torch.equal(cifar100(tmp_path, subset=150).train.images, splits.train.images[:150])
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of its blocks, the first is train_001.webp"):
        cifar100(tmp_path)


def test_packed_blocks_that_were_changed_are_refused(tmp_path: Path) -> None:
    held = write_packed(tmp_path)
    from PIL import Image

    held["train"][600, 0, 0, 0] ^= 1
    Image.fromarray(held["train"][500:].reshape(-1, 32, 3)).save(tmp_path / "train_001.webp", lossless=True, quality=0)
    with pytest.raises(ValueError, match=r"the train blocks in .* do not have the checksum of meta.json"):
        cifar100(tmp_path)
    (tmp_path / "train_001.webp").write_bytes((tmp_path / "train_001.webp").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"train_001.webp is not a block of 32 x 32 images"):
        cifar100(tmp_path)
    with pytest.raises(ValueError, match="cannot take 1001 of 1000 images"):
        write_packed(tmp_path)
        cifar100(tmp_path, subset=1001)


def test_answers_to_augmentations_are_kept_by_the_seed_that_drew_them(tmp_path: Path) -> None:
    """Two presets of a seed share one recording; another seed draws other augmentations, and makes its own."""
    write_packed(tmp_path, train=500)
    options = {"teacher": "resnet8", "student": "resnet8", "subset": 100, "test_subset": 100, "epochs": 2, "threads": 1}
    options |= {"teacher_epochs": 1, "teacher_cache": 2, "teacher_dir": tmp_path / "teachers", "quiet": True}
    options |= {"data": tmp_path, "selfcheck": False}  # a teacher of noise knows nothing

    def kept() -> dict[str, int]:
        return {path.parent.name: path.stat().st_mtime_ns for path in tmp_path.glob("teachers/answers-*/key.json")}

    made = []
    for method, seed in (("kd", 0), ("dtkd", 0), ("kd", 1)):
        recipes.run("cifar100", options | {"method": method, "seed": seed, "out": tmp_path / f"{method}-{seed}"})
        made.append(kept())
    assert made[0] == made[1] and made[1].items() < made[2].items() and len(made[2]) == 2
    found = json.loads((tmp_path / "dtkd-0" / "analysis.json").read_text())
    assert found["agreement"] is not None and found["accuracy"]["teacher"] is not None, (
        "the model is asked about the test"
    )
    assert len(found["temperatures"]["by_difficulty"]) == 5


def test_r2kd_has_a_pruned_teacher_and_mixed_views(tmp_path: Path) -> None:
    write_packed(tmp_path, train=500)
    options = {"data": tmp_path, "teacher": "resnet8", "student": "resnet8", "method": "r2kd"}
    options |= {"subset": 100, "test_subset": 100, "epochs": 1, "threads": 1, "quiet": True, "selfcheck": False}
    options |= {"batch_size": 50, "teacher_dir": tmp_path / "teachers"}
    terms: list[dict[str, float]] = []
    for views, amount in (("one", 0.0), ("cutmix", 0.0), ("cutmix", 0.1)):
        out = tmp_path / f"{views}-{amount}"
        recipes.run("cifar100", options | {"views": views, "teacher_pruned": amount, "out": out})
        terms.append(left(out)["lines"]["steps.jsonl"][-1]["terms"])
    assert all(terms[i]["rows"] != terms[i + 1]["rows"] for i in range(2)), terms


def test_replayed_views_are_what_training_would_have_shown(tmp_path: Path) -> None:
    """So the student alone, who asks no teacher, sees the same images as every preset of its seed."""
    write_packed(tmp_path, train=500)
    drawn = cifar100(tmp_path, batch_size=100, subset=200, seed=3).train
    for epoch, (own, kept) in enumerate(zip([drawn] * 2, [drawn.replay(2)] * 2, strict=True)):
        own.set_epoch(epoch)
        kept.set_epoch(epoch)
        for (a, _, _), (b, _, _) in zip(own, kept, strict=True):
            assert torch.equal(a, b)


@needs_shared
def test_the_real_data_is_what_was_published() -> None:
    splits = cifar100(PACKED, batch_size=128, validation=5000)
    assert splits.validation is not None
    assert [part.size for part in splits if part is not None] == [45000, 5000, 10000]
    assert torch.bincount(splits.train.labels).unique().tolist() == [450]
    assert torch.bincount(splits.validation.labels).unique().tolist() == [50]
    names = splits.train.class_names
    assert names is not None and len(names) == 100 and names[0] == "apple" and names[-1] == "worm"
    few = cifar100(PACKED, subset=1000, test_subset=100)
    assert torch.bincount(few.train.labels).tolist() == [10] * 100
    assert torch.bincount(few.test.labels).tolist() == [1] * 100
    pixels = splits.train.images.numpy()
    assert np.abs(pixels.mean((0, 2, 3)) / 255 - cifar.MEAN).max() < 1e-3
    normal = torch.cat([x for x, _, _ in few.train.clean()])
    assert normal.mean((0, 2, 3)).abs().max() < 0.05 and (normal.std((0, 2, 3)) - 1).abs().max() < 0.05
