"""Read, decode, crop and normalize a folder of JPEGs: our loader against timm's create_loader and torchvision's folder.

An epoch of each, in turn, with the same number of workers; CPU time is that of all processes. Crops are drawn as
torchvision draws them, resized bilinearly, and batches are normalized floats.

Usage:
    python benchmarks/images.py [--rounds 5] [--images 2000] [--size 224] [--batch 50] [--workers 2] [--tiny]
"""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timing import ROOT, Sheet, arguments, in_turn, installed

from tempering.data import lazy_image_folder
from tempering.models.external_detectors import torchvision

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES = 10
Loader = Callable[[], Iterable[object]]


def pictures(count: int, sides: tuple[int, int]) -> Path:
    """A folder of made-up JPEGs, as many for training as asked for, and a few to score; made once."""
    folder = ROOT / "build" / f"images-{count}-{sides[0]}-{sides[1]}"
    if (folder / "done").is_file():
        return folder
    rng = np.random.default_rng(0)
    for i in range(count + CLASSES):
        width, height = (int(rng.integers(sides[0], sides[1] + 1)) for _ in range(2))
        picture = np.zeros((height, width, 3))
        for cells in (3, 7, 15, 31, 63, 127):  # as natural images, noise of about equal strength in every octave
            noise = rng.integers(256, size=(cells, cells, 3), dtype=np.uint8)
            picture += Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        picture = (picture - picture.min()) / np.ptp(picture) * 255
        file = folder / ("train" if i < count else "val") / f"class{i % CLASSES}" / f"{i:05d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.astype(np.uint8)).save(file, quality=90)
    (folder / "done").touch()
    return folder


def ours(folder: Path, size: int, batch: int, workers: int, *, train: bool, draft: bool = True) -> Loader:
    """Our loader of one split."""
    splits = lazy_image_folder(folder, size=size, batch_size=batch, workers=workers, draft=draft)
    return lambda: splits.train if train else splits.train.clean()


def timms(folder: Path, size: int, batch: int, workers: int, *, train: bool) -> Loader:
    """timm's, without what it adds to crops and flips by default."""
    torchvision()
    from timm.data import create_dataset, create_loader  # pyright: ignore[reportMissingImports]

    loader = create_loader(
        create_dataset("", str(folder / "train")),
        input_size=(3, size, size),
        batch_size=batch,
        is_training=train,
        color_jitter=None,
        interpolation="bilinear",
        mean=MEAN,
        std=STD,
        num_workers=workers,
        crop_pct=0.875,
        persistent_workers=False,
        device=torch.device("cpu"),
    )
    return lambda: loader


def torchvisions(folder: Path, size: int, batch: int, workers: int, *, train: bool) -> Loader:
    """torchvision's folder and transforms, in torch's DataLoader."""
    torchvision()
    from torchvision import datasets, transforms  # pyright: ignore[reportMissingImports]

    crop = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    crop = crop if train else [transforms.Resize(round(size / 0.875)), transforms.CenterCrop(size)]
    whole = transforms.Compose([*crop, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    data = datasets.ImageFolder(str(folder / "train"), whole)
    loader = torch.utils.data.DataLoader(data, batch_size=batch, shuffle=train, num_workers=workers)
    return lambda: loader


def spent() -> float:
    """CPU seconds of this process and of its workers that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def main() -> None:
    """Time an epoch of every loader, training and clean images."""
    parser = arguments(__doc__, rounds=5, images=2000, size=224, batch=50, workers=2)
    args = parser.parse_args()
    sheet = Sheet("images", args)
    count, size, batch = (40, 32, 8) if args.tiny else (args.images, args.size, args.batch)
    made = {"256 to 400": (256, 400)} if not args.tiny else {"40 to 60": (40, 60)}
    if not args.tiny:
        made |= {"900 to 1200": (900, 1200)}
    for pixels, sides in made.items():
        n = count if sides[1] <= 400 else count // 10
        folder = pictures(n, sides)
        for train in (True, False):
            how = {"size": size, "batch": batch, "workers": args.workers, "train": train}
            loaders = {"timm, create_loader": timms(folder, **how)} if installed("timm") else {}
            if installed("torchvision"):
                loaders["torchvision, ImageFolder"] = torchvisions(folder, **how)
            loaders["ours"] = ours(folder, **how)
            if train:
                loaders["ours, draft=False"] = ours(folder, **how, draft=False)
            walls: dict[str, list[float]] = {name: [] for name in loaders}

            def measure(name: str, loaders: dict[str, Loader] = loaders, walls: dict[str, Any] = walls) -> float:
                begun, cpu = time.perf_counter(), spent()
                for _ in loaders[name]():
                    pass
                walls[name].append(time.perf_counter() - begun)
                return spent() - cpu

            taken = in_turn({name: name for name in loaders}, rounds=args.rounds, measure=measure)
            case = f"{'random crops' if train else 'clean images'} of {pixels} pixels to {size}, {args.workers} workers"
            for clock, times in (("CPU", taken), ("wall", {k: v[-args.rounds :] for k, v in walls.items()})):
                rates = {k: f"{n / statistics.median(v):.0f} images per second" for k, v in times.items()}
                first = next(iter(loaders))
                rates[first] += f"; load average {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores"
                sheet.add(f"{case}, {clock}", times, notes=rates, per=n)
    print(sheet.write())


if __name__ == "__main__":
    main()
