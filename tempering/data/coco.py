"""Detection data in COCO's format, decoded once into memory at one size."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tempering.data.batches import Splits, train_val_split
from tempering.data.detection import Augment, DetectionLoader
from tempering.data.folders import rgb

NAMES = {"train": ("train",), "validation": ("val", "valid", "validation"), "test": ("test",)}
YEARS = ("", "2017", "2014")
GROUND = 114  # gray of what letterboxing leaves free
Fit = Literal["letterbox", "stretch"]


class _Split(NamedTuple):
    """One annotation file: where it lies, its object, and where its images may lie."""

    path: Path
    content: dict[str, Any]
    places: list[Path]


def coco(
    folder: str | Path,
    *,
    size: int,
    batch_size: int = 16,
    fit: Fit = "letterbox",
    validation: int = 0,
    test: int = 0,
    subset: int | None = None,
    flip: bool = True,
    augment: Sequence[Augment] = (),
    epochs: int = 1,
    seed: int = 0,
) -> Splits:
    """Images (3, size, size) with boxes, from FOLDER/annotations_SPLIT.json and FOLDER/images, or COCO's own layout.

    Also found: annotations/instances_SPLIT2017.json with SPLIT2017/ or images/SPLIT2017/, and
    SPLIT/_annotations.coco.json. SPLIT is train, val (valid, validation) or test; of train and one other, the other is
    the test split. Classes are the categories by their id. Crowds, boxes of no size and boxes outside their image are
    left out and counted in ``dropped``; boxes are cut to their image. Images in gray, of 16 bits or with a palette
    become RGB in 8 bits.

    Args:
        folder: as above.
        size: pixels a side; detectors want a multiple of 32.
        batch_size: of all splits.
        fit: "letterbox" keeps the proportions and fills up with gray; "stretch" does not.
        validation, test: images to hold out of the training ones where there is no such split; always the same ones.
        subset: train on this many images.
        flip, augment, epochs, seed: as Scenes has them, for training.

    Raises:
        FileNotFoundError: where there is no annotation file or an image is missing, saying what was looked for.
        ValueError: for files that are broken or do not fit together, saying which.
        ImportError: without Pillow.
    """
    folder = Path(folder)
    if fit not in ("letterbox", "stretch") or not isinstance(size, int) or size < 1:
        raise ValueError(f"coco() needs size >= 1 and fit 'letterbox' or 'stretch'; got size={size!r}, fit={fit!r}.")
    files = {split: found for split, names in NAMES.items() if (found := _find(folder, names)) is not None}
    if "train" not in files:
        raise FileNotFoundError(
            f"{folder} holds no training annotations. Expected annotations_train.json with images/ beside it, "
            "annotations/instances_train2017.json, and train/_annotations.coco.json."
        )
    names = _classes(files)
    settings = {"batch_size": batch_size, "class_names": list(names.values()), "epochs": epochs, "seed": seed}
    settings["name"] = folder.resolve().name
    made = {split: _scenes(file, list(names), size, fit, settings) for split, file in files.items()}
    splits = train_val_split(made.pop("train"), made, validation=validation, test=test)
    train: Any = splits.train if subset is None else splits.train.subset(subset)
    train.shuffle, train.flip, train.augment = True, flip, tuple(augment)
    return splits._replace(train=train)


def _find(folder: Path, names: Sequence[str]) -> _Split | None:
    for name in names:
        places = [folder / "images", folder / name, folder / "images" / name, folder]
        places += [inner / f"{name}{year}" for year in YEARS[1:] for inner in (folder, folder / "images")]
        annotations = folder / "annotations"
        files = [folder / f"annotations_{name}.json", folder / name / "_annotations.coco.json"]
        files += [annotations / f"{name}.json", *(annotations / f"instances_{name}{year}.json" for year in YEARS)]
        if path := next((file for file in files if file.is_file()), None):
            return _Split(path, _read(path), places)
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}). Copy it again.") from error
    missing = [k for k in ("images", "annotations", "categories") if not isinstance(content, dict) or k not in content]
    if missing:
        raise ValueError(f"{path} is not in COCO's format: it lacks {', '.join(missing)}.")
    return content


def _classes(files: Mapping[str, _Split]) -> dict[int, str]:
    """id -> name of the categories, by id; the same in all files."""
    read = {
        split: dict(sorted((int(c["id"]), str(c["name"])) for c in file.content["categories"]))
        for split, file in files.items()
    }
    for split, names in read.items():
        if names != read["train"]:
            raise ValueError(
                f"{files[split].path} has the categories {_said(names)}, and {files['train'].path} has "
                f"{_said(read['train'])}. Every split needs the same ids and names: copy the list of the training "
                "file, and number the annotations as it does."
            )
    if not read["train"]:
        raise ValueError(f"{files['train'].path} has no categories.")
    return read["train"]


def _said(names: Mapping[int, str]) -> str:
    return ", ".join(f"{i}={name}" for i, name in list(names.items())[:6]) or "none"


def _scenes(file: _Split, ids: list[int], size: int, fit: Fit, settings: dict[str, Any]) -> DetectionLoader:
    entries = file.content["images"]
    if not entries:
        raise ValueError(f"{file.path} lists no images.")
    place, label = {entry["id"]: i for i, entry in enumerate(entries)}, {c: i for i, c in enumerate(ids)}
    if len(place) != len(entries):
        raise ValueError(f"{file.path} lists two images of one id.")
    boxes: list[list[list[float]]] = [[] for _ in entries]
    labels: list[list[int]] = [[] for _ in entries]
    dropped = {"crowd": 0}
    for one in file.content["annotations"]:
        if one.get("image_id") not in place or one.get("category_id") not in label:
            raise ValueError(
                f"{file.path}: the annotation {one.get('id')} is of image {one.get('image_id')} and category "
                f"{one.get('category_id')}, and one of them is not in the file."
            )
        if one.get("iscrowd"):
            dropped["crowd"] += 1
            continue
        boxes[place[one["image_id"]]].append(_corners(one, file.path))
        labels[place[one["image_id"]]].append(label[one["category_id"]])
    images = np.empty((len(entries), 3, size, size), np.uint8)
    moved = torch.zeros(len(entries), 4)  # x and y scale, x and y offset

    def fill(i: int) -> None:
        images[i], moved[i] = _open(entries[i], file, size, fit)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(fill, range(len(entries))))
    placed = []
    for own, entry, (scale, offset) in zip(boxes, entries, moved.unflatten(1, (2, 2)), strict=True):
        kept = _cut(torch.tensor(own, dtype=torch.float64).view(-1, 4), entry)
        placed.append((kept * scale.double().repeat(2) + offset.double().repeat(2)).float())
    return DetectionLoader(
        torch.from_numpy(images),
        placed,
        [torch.tensor(own, dtype=torch.int64) for own in labels],
        scales=moved[:, :2].prod(1).sqrt(),
        dropped={reason: count for reason, count in dropped.items() if count},
        **settings,
    )


def _corners(one: Mapping[str, Any], path: Path) -> list[float]:
    box = one.get("bbox")
    numbers = isinstance(box, list) and all(isinstance(x, int | float) and math.isfinite(x) for x in box)
    if not isinstance(box, list) or len(box) != 4 or not numbers:
        raise ValueError(f"{path}: the annotation {one.get('id')} needs bbox [x, y, width, height]; got {box!r}.")
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]]


def _cut(boxes: Tensor, entry: Mapping[str, Any]) -> Tensor:
    """Boxes cut to the original image; those wholly outside, or of no size, as boxes that stay empty or outside.

    Letterboxing has room beside the image, to which boxes must not reach.
    """
    limit = boxes.new_tensor([entry["width"], entry["height"]] * 2)
    cut = torch.minimum(boxes.clamp_min(0), limit)
    lost = (cut[:, 2:] <= cut[:, :2]).any(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)
    # far outside of any canvas
    return torch.where(lost[:, None], boxes.new_tensor([-2e6, -2e6, -1e6, -1e6]), cut)


def _open(entry: Mapping[str, Any], file: _Split, size: int, fit: Fit) -> tuple[np.ndarray, Tensor]:
    """The image (3, size, size), and by what its boxes are scaled and moved."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("images are read by Pillow: pip install 'tempering[detection]'") from error
    path = next((p for place in file.places if (p := place / str(entry["file_name"])).is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"{file.path} lists the image {entry['file_name']}, which is not in {', '.join(map(str, file.places[:3]))}."
        )
    try:
        with Image.open(path) as opened:
            image = rgb(opened)
            told = (entry.get("width"), entry.get("height"))
            if image.size != told:
                # boxes are drawn on pixels as they are stored, or as a viewer turns them; the file says which
                image = rgb(ImageOps.exif_transpose(opened))
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises all three for broken files
        raise ValueError(f"{path} cannot be read as an image ({error}). Remove it, or copy it again.") from error
    if image.size != told:
        raise ValueError(f"{path} is {image.size} pixels and {file.path} says {told}, so its boxes cannot be placed.")
    wide, high = image.size
    new = (size, size)
    if fit == "letterbox":
        share = size / max(wide, high)
        new = (max(1, round(wide * share)), max(1, round(high * share)))
    pixels = np.full((size, size, 3), GROUND, np.uint8)
    x, y = (size - new[0]) // 2, (size - new[1]) // 2
    pixels[y : y + new[1], x : x + new[0]] = np.asarray(image.resize(new, Image.Resampling.BILINEAR))
    return pixels.transpose(2, 0, 1), torch.tensor([new[0] / wide, new[1] / high, x, y])
