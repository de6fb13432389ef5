"""Load CIFAR-100 from packed lossless blocks, or from the official archive with a checksum and a safe unpickler."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tempering.data.batches import Batches, Splits

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
ARCHIVE, INNER = "cifar-100-python.tar.gz", "cifar-100-python"
ADDRESS = f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}"
MD5 = {  # as torchvision lists them
    ARCHIVE: "eb9058c3a382ffc7106e4002c42a8d85",
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}
SIZE = 32  # height and width of an image
BLOCK = 500  # images in a packed block


class Part(NamedTuple):
    """One split: images (N, 32, 32, 3) uint8 and fine labels (N,)."""

    images: np.ndarray
    labels: np.ndarray


Reader = Callable[[str, int | None], Part]


def cifar100(
    folder: str | Path,
    *,
    batch_size: int = 64,
    subset: int | None = None,
    validation: int = 0,
    test_subset: int | None = None,
    size: int = SIZE,
    crop: int | None = None,
    flip: bool = True,
    seed: int = 0,
    channels_last: bool = False,
    pixels: bool = False,
) -> Splits[Batches]:
    """Load CIFAR-100: 50,000 / 0 / 10,000 images (3, size, size) of 100 fine classes, augmented by crops and flips.

    Args:
        folder: with packed blocks (meta.json, labels.npz, train_000.webp ...), the official archive
            ``cifar-100-python.tar.gz``, its extracted files, or a folder that contains one of these.
        batch_size: of all splits.
        subset: number of training images to use, stratified by class; only the packed blocks needed are decoded.
        validation: number of these to hold out, always the same ones, stratified by class.
        test_subset: number of test images to use, stratified by class.
        size: height and width, 32 or a divisor of it: every pixel is the mean of a square of pixels, rounded; computed
            once, before any augmentation. The mean and std for normalization stay those of 32 x 32.
        crop: padding of the random crops, in pixels; default: an eighth of ``size``, 4 of 32.
        flip: whether training images are flipped at random.
        seed: of order and augmentation.
        channels_last: use the channels_last memory format for the inputs.
        pixels: leave inputs as pixels in [0, 1], for models that normalize their inputs (``models.Normalized``).

    Raises:
        FileNotFoundError: if no data are found, stating which files were looked for and how to download them.
        ValueError: for files that are not the published ones, or that contain anything but arrays and containers.
    """
    for name, count in (("subset", subset), ("test_subset", test_subset)):
        if count is not None and count < 1:
            raise ValueError(f"cifar100 needs {name} >= 1, or None for all; got {count}.")
    if size < 1 or SIZE % size:
        raise ValueError(f"cifar100 needs a size that divides {SIZE}, such as 16; got {size}.")
    crop = size // 8 if crop is None else crop
    read, names = _reader(Path(folder))
    settings: dict[str, Any] = {
        "batch_size": batch_size,
        "mean": (0.0, 0.0, 0.0) if pixels else MEAN,
        "std": (1.0, 1.0, 1.0) if pixels else STD,
        "seed": seed,
        "channels_last": channels_last,
        "class_names": names,
        "name": "cifar100" if size == SIZE else f"cifar100-{size}",
    }
    train = Batches(*_tensors(read("train", subset), size), **settings, shuffle=True, crop=crop, flip=flip)
    test = Batches(*_tensors(read("test", test_subset), size), **settings)
    train = train if subset is None else train.subset(subset)
    test = test if test_subset is None else test.subset(test_subset)
    if not validation:
        return Splits(train, None, test)
    train, held_out = train.split(validation, seed=0)
    return Splits(train, held_out, test)


def _tensors(part: Part, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.from_numpy(_averaged(part.images, SIZE // size)).permute(0, 3, 1, 2).contiguous()
    return images, torch.from_numpy(part.labels.astype(np.int64))


def _averaged(images: np.ndarray, factor: int) -> np.ndarray:
    """Return the means of ``factor`` x ``factor`` pixels of images (N, H, W, C) uint8, half rounded up."""
    if factor == 1:
        return images
    n, height, width, channels = images.shape
    squares = images.reshape(n, height // factor, factor, width // factor, factor, channels)
    return ((squares.sum((2, 4), dtype=np.uint32) + factor**2 // 2) // factor**2).astype(np.uint8)


def _reader(folder: Path) -> tuple[Reader, Sequence[str]]:
    """Return a function that reads a split, and the class names."""
    if (folder / "meta.json").is_file() and (folder / "labels.npz").is_file():
        meta = json.loads((folder / "meta.json").read_bytes())
        return lambda split, limit: _packed(folder, meta, split, limit), meta["class_names"]
    for archive in (folder, folder / ARCHIVE):
        if archive.is_file():
            return _official(_from_archive(archive))
    for path in (folder, folder / INNER):
        if all((path / name).is_file() for name in ("train", "test", "meta")):
            return _official({name: (path / name, (path / name).read_bytes()) for name in ("train", "test", "meta")})
    reason = "holds none of these" if folder.is_dir() else "is not there"
    raise FileNotFoundError(
        f"no CIFAR-100 in {folder}: it {reason}. Expected packed blocks (meta.json, labels.npz, train_000.webp "
        f"...), for {ARCHIVE}, and for {INNER}/ with train, test and meta. To download it: curl -LO {ADDRESS}, then "
        f"pass the path of {ARCHIVE}."
    )


# packed blocks


def _packed(folder: Path, meta: dict[str, Any], split: str, limit: int | None) -> Part:
    """Read the first ``limit`` images of a split; the checksum is verified if the whole split is read."""
    facts = meta["splits"][split]
    count = facts["images"] if limit is None else min(limit, facts["images"])
    paths = [folder / f"{split}_{i:03d}.webp" for i in range(-(-count // BLOCK))]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {len(missing)} of its blocks, the first is {missing[0]}. Copy it again."
        )
    # Pillow releases the GIL while it decodes
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        images = np.concatenate(list(pool.map(_block, paths)))[:count]
    if count == facts["images"] and hashlib.sha256(images.data).hexdigest() != facts["sha256_uint8_NHWC"]:
        raise ValueError(f"the {split} blocks in {folder} do not have the checksum of meta.json. Copy them again.")
    with np.load(folder / "labels.npz", allow_pickle=False) as arrays:
        return Part(images, arrays[f"{split}_labels"][:count])


def _block(path: Path) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('packed CIFAR-100 is read by Pillow: pip install "tempering[data]"') from error
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB")).reshape(-1, 32, 32, 3)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a block of 32 x 32 images ({error}). Copy it again.") from error


# the official archive


def _from_archive(archive: Path) -> dict[str, tuple[Path, bytes]]:
    data = archive.read_bytes()
    _check(archive, ARCHIVE, data)
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as tar:
        out = {}
        for name in ("train", "test", "meta"):
            member = tar.extractfile(f"{INNER}/{name}")
            assert member is not None
            out[name] = (archive / name, member.read())
    return out


def _check(path: Path, name: str, data: bytes) -> None:
    digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if digest != MD5[name]:
        raise ValueError(
            f"{path} has md5 {digest}, and the published file {MD5[name]}: it is truncated or another file, and is not "
            f"read. Download it again: curl -LO {ADDRESS}"
        )


def _official(files: dict[str, tuple[Path, bytes]]) -> tuple[Reader, Sequence[str]]:
    contents = {}
    for name, (path, data) in files.items():
        _check(path, name, data)
        contents[name] = _RestrictedUnpickler(data, path).load()

    def read(split: str, limit: int | None) -> Part:
        pixels = np.asarray(contents[split]["data"], np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return Part(pixels, np.asarray(contents[split]["fine_labels"], np.uint8))

    return read, list(contents["meta"]["fine_label_names"])


class _RestrictedUnpickler(pickle.Unpickler):
    """Unpickle numpy arrays and plain containers only, so that a file cannot run code."""

    def __init__(self, data: bytes, path: Path) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")  # the files were written by Python 2
        self.path = path

    def find_class(self, module_name: str, global_name: str) -> Any:
        allowed = {
            "multiarray._reconstruct": np.empty(0).__reduce__()[0],
            "numpy.ndarray": np.ndarray,
            "numpy.dtype": np.dtype,
        }
        short = module_name.removeprefix("numpy.core.").removeprefix("numpy._core.")
        if f"{short}.{global_name}" in allowed:
            return allowed[f"{short}.{global_name}"]
        raise ValueError(
            f"{self.path} contains {module_name}.{global_name}, which no array or plain container needs: it is not "
            "CIFAR-100 and is not read further. Do not open it with pickle."
        )
