"""Load detection data in COCO's format, decoded once into memory at one size."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tempering.data.batches import Splits, train_val_split
from tempering.data.detection import Augment, DetectionLoader
from tempering.data.folders import named_if_unreadable, rgb

NAMES = {"train": ("train",), "validation": ("val", "valid", "validation"), "test": ("test",)}
YEARS = ("", "2017", "2014")
GROUND = 114  # gray value of the padding in letterboxed images
Fit = Literal["letterbox", "stretch"]


class _Split(NamedTuple):
    """One annotation file: its path, its parsed content, and the folders that may contain its images."""

    path: Path
    content: dict[str, Any]
    folders: list[Path]


def coco(
    folder: str | Path,
    *,
    size: int,
    batch_size: int = 16,
    fit: Fit = "letterbox",
    validation: float = 0,
    test: float = 0,
    subset: int | None = None,
    parts: Sequence[str] = (),
    flip: bool = True,
    augment: Sequence[Augment] = (),
    epochs: int = 1,
    seed: int = 0,
) -> Splits[DetectionLoader]:
    """Load images (3, size, size) with boxes from FOLDER/annotations_SPLIT.json and FOLDER/images, or COCO's layout.

    Also supported: annotations/instances_SPLIT2017.json with SPLIT2017/ or images/SPLIT2017/, and
    SPLIT/_annotations.coco.json. SPLIT is train, val (valid, validation) or test; if there are only train and one other
    split, the other one is the test split. Classes are the categories, ordered by id, without a root category as
    Roboflow writes it: the supercategory of all others, without annotations. Crowds, boxes of zero size and
    boxes outside their image are not trained on and counted in ``dropped``; boxes are clipped to their image. Scores
    are those of pycocotools on the file: with its boxes as they are, and detections in a crowd not counted. Grayscale,
    16-bit and palette images are converted to 8-bit RGB.

    Args:
        folder: as above.
        size: height and width of the images in pixels; detectors need a multiple of 32.
        batch_size: of all splits.
        fit: "letterbox" keeps the aspect ratio and pads with gray; "stretch" does not keep it.
        validation, test: number of training images to hold out if there is no such split; always the same ones.
        subset: number of training images to use.
        parts: of targets, beside boxes and labels: "masks", the polygons or run lengths of annotations as masks
            (M, size, size), and "keypoints", (M, K, 3) as x, y and visibility.
        flip, augment, epochs, seed: of the training split, as in ``DetectionLoader``.

    Raises:
        FileNotFoundError: for a missing annotation file or image, stating which files were looked for.
        ValueError: for files that are corrupt or inconsistent, naming them.
        ImportError: without Pillow.
    """
    folder = Path(folder)
    if fit not in ("letterbox", "stretch") or not isinstance(size, int) or size < 1:
        raise ValueError(f"coco() needs size >= 1 and fit 'letterbox' or 'stretch'; got size={size!r}, fit={fit!r}.")
    files = {split: file for split, names in NAMES.items() if (file := _find(folder, names)) is not None}
    if "train" not in files:
        raise FileNotFoundError(
            f"{folder} holds no training annotations. Expected annotations_train.json and images/, "
            "annotations/instances_train2017.json, and train/_annotations.coco.json."
        )
    names = _classes(files)
    settings = {"batch_size": batch_size, "class_names": list(names.values()), "epochs": epochs, "seed": seed}
    settings["name"] = folder.resolve().name
    if unknown := set(parts) - {"masks", "keypoints"}:
        raise ValueError(f"coco() knows the parts 'masks' and 'keypoints'; got {', '.join(sorted(unknown))}.")
    settings |= {"parts": tuple(parts), "mirrored": _mirrored(files["train"]) if "keypoints" in parts else None}
    loaders = {split: _load(file, list(names), size, fit, dict(settings)) for split, file in files.items()}
    splits = train_val_split(loaders.pop("train"), loaders, validation=validation, test=test)
    train = splits.train if subset is None else splits.train.subset(subset)
    train.shuffle, train.flip, train.augment = True, flip, tuple(augment)
    return splits._replace(train=train)


def _find(folder: Path, names: Sequence[str]) -> _Split | None:
    for name in names:
        folders = [folder / "images", folder / name, folder / "images" / name, folder]
        folders += [inner / f"{name}{year}" for year in YEARS[1:] for inner in (folder, folder / "images")]
        annotations = folder / "annotations"
        files = [folder / f"annotations_{name}.json", folder / name / "_annotations.coco.json"]
        files += [annotations / f"{name}.json", *(annotations / f"instances_{name}{year}.json" for year in YEARS)]
        if path := next((file for file in files if file.is_file()), None):
            return _Split(path, _read(path), folders)
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # with or without a byte order mark
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}). Copy it again.") from error
    missing = [k for k in ("images", "annotations", "categories") if not isinstance(content, dict) or k not in content]
    if missing:
        raise ValueError(f"{path} is not in COCO's format: it lacks {', '.join(missing)}.")
    return content


def _classes(files: Mapping[str, _Split]) -> dict[int, str]:
    """Return id -> name of the categories, ordered by id; they must be equal in all files.

    Roboflow's root category, to which no annotation belongs, is left out.
    """
    for file in files.values():
        repeated = [i for i, count in Counter(int(c["id"]) for c in file.content["categories"]).items() if count > 1]
        if repeated:
            same = [str(c["name"]) for c in file.content["categories"] if int(c["id"]) == repeated[0]]
            raise ValueError(
                f"{file.path} has {len(same)} categories of id {repeated[0]}: {', '.join(same)}. Give each its own id, "
                "and number the annotations as it does."
            )
    root = _root(list(files.values()))
    categories = {
        split: dict(sorted((int(c["id"]), str(c["name"])) for c in file.content["categories"] if int(c["id"]) != root))
        for split, file in files.items()
    }
    for split, names in categories.items():
        if names != categories["train"]:
            raise ValueError(
                f"{files[split].path} has the categories {_to_text(names)}, and {files['train'].path} has "
                f"{_to_text(categories['train'])}. Every split needs the same ids and names: copy the list of the "
                "training file, and number the annotations as it does."
            )
    if not categories["train"]:
        raise ValueError(f"{files['train'].path} has no categories.")
    return categories["train"]


def _root(files: Sequence[_Split]) -> int | None:
    """Return the id of a category that is only the supercategory of all others and has no annotation in any file."""
    listed = files[0].content["categories"]
    parents = {str(c["id"]): str(c.get("supercategory")) for c in listed}
    for category in listed:
        others = {parent for i, parent in parents.items() if i != str(category["id"])}
        used = any(a.get("category_id") == category["id"] for file in files for a in file.content["annotations"])
        if others == {str(category["name"])} and not used and parents[str(category["id"])] in ("none", "None", ""):
            return int(category["id"])
    return None


def _to_text(names: Mapping[int, str]) -> str:
    return ", ".join(f"{i}={name}" for i, name in list(names.items())[:6]) or "none"


def _mirrored(file: _Split) -> list[int] | None:
    """Return the number of each keypoint's mirror image, by names that begin with left and right; None without names.

    Raises:
        ValueError: for categories of several keypoints each.
    """
    listed = {tuple(c["keypoints"]) for c in file.content["categories"] if c.get("keypoints")}
    if len(listed) > 1:
        raise ValueError(f"{file.path} has categories of different keypoints; a detector predicts the same for all.")
    names: tuple[str, ...] = next(iter(listed), ())
    mirror = {n: n.replace("left", "right") if "left" in n else n.replace("right", "left") for n in names}
    return [names.index(mirror[n]) if mirror[n] in names else i for i, n in enumerate(names)] or None


def _load(file: _Split, ids: list[int], size: int, fit: Fit, settings: dict[str, Any]) -> DetectionLoader:
    entries = file.content["images"]
    if not entries:
        raise ValueError(f"{file.path} lists no images.")
    index, label = {entry["id"]: i for i, entry in enumerate(entries)}, {c: i for i, c in enumerate(ids)}
    if len(index) != len(entries):
        raise ValueError(f"{file.path} lists two images with the same id.")
    boxes: list[list[list[float]]] = [[] for _ in entries]
    labels: list[list[int]] = [[] for _ in entries]
    crowds: list[list[bool]] = [[] for _ in entries]
    of_image: list[list[dict[str, Any]]] = [[] for _ in entries]  # annotations that are trained on
    dropped = {"crowd": 0}
    for annotation in file.content["annotations"]:
        if annotation.get("image_id") not in index or annotation.get("category_id") not in label:
            raise ValueError(
                f"{file.path}: the annotation {annotation.get('id')} is of image {annotation.get('image_id')} and "
                f"category {annotation.get('category_id')}, and one of them is not in the file."
            )
        i = index[annotation["image_id"]]
        boxes[i].append(_corners(annotation, file.path))
        labels[i].append(label[annotation["category_id"]])
        crowds[i].append(bool(annotation.get("iscrowd")))
        dropped["crowd"] += crowds[i][-1]
        of_image[i] += [] if crowds[i][-1] else [annotation]
    images = np.empty((len(entries), 3, size, size), np.uint8)
    transforms = torch.zeros(len(entries), 4)  # x and y scale, x and y offset

    def fill(i: int) -> None:
        images[i], transforms[i] = _open(entries[i], file, size, fit)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(fill, range(len(entries))))
    targets = [
        _target(
            torch.tensor(image_boxes, dtype=torch.float64).view(-1, 4), image_labels, image_crowds, entry, transform
        )
        for image_boxes, image_labels, image_crowds, entry, transform in zip(
            boxes, labels, crowds, entries, transforms.double(), strict=True
        )
    ]
    readers = {"masks": _masks, "keypoints": _keypoints}
    settings["parts"] = {
        name: [
            readers[name](annotations, transform, entry, size, file.path)
            for annotations, transform, entry in zip(of_image, transforms.tolist(), entries, strict=True)
        ]
        for name in settings["parts"]
    }
    return DetectionLoader(
        torch.from_numpy(images),
        [target["boxes"] for target in targets],
        [target["labels"] for target in targets],
        scales=transforms[:, :2].prod(1).sqrt(),
        dropped={reason: count for reason, count in dropped.items() if count},
        scored=[target["scored"] for target in targets],
        **settings,
    )


def _keypoints(
    annotations: Sequence[dict[str, Any]], transform: list[float], entry: Mapping[str, Any], size: int, path: Path
) -> Tensor:
    """Return the keypoints (M, K, 3) of annotations in the resized image; those that are not labeled stay 0."""
    points = [a.get("keypoints") for a in annotations]
    for annotation, one in zip(annotations, points, strict=True):
        if not isinstance(one, list) or len(one) % 3 or len(one) != len(points[0] or ()):
            raise ValueError(
                f"{path}: the annotation {annotation.get('id')} needs keypoints [x, y, visible, ...], as many as the "
                f"others; got {one!r}. Without keypoints, leave out parts=."
            )
    found = torch.tensor(points, dtype=torch.float32).view(len(points), len(points[0] or ()) // 3 if points else 0, 3)
    x, y, dx, dy = transform
    moved = found * found.new_tensor([x, y, 1.0]) + found.new_tensor([dx, dy, 0.0])
    return torch.where(found[..., 2:] > 0, moved, found)


def _masks(
    annotations: Sequence[dict[str, Any]], transform: list[float], entry: Mapping[str, Any], size: int, path: Path
) -> Tensor:
    """Return the masks (M, size, size) of annotations in the resized image."""
    return torch.from_numpy(
        np.stack([_mask(a, transform, entry, size, path) for a in annotations])
        if annotations
        else np.zeros((0, size, size), bool)
    )


def _mask(
    annotation: dict[str, Any], transform: list[float], entry: Mapping[str, Any], size: int, path: Path
) -> np.ndarray:
    try:
        from pycocotools import mask as coder
    except ImportError as error:
        raise ImportError("masks are read by pycocotools: pip install 'tempering[detection]'") from error
    x, y, dx, dy = transform
    outline = annotation.get("segmentation")
    if isinstance(outline, list) and outline and all(isinstance(p, list) and len(p) >= 6 for p in outline):
        moved = [[v * (x, y)[i % 2] + (dx, dy)[i % 2] for i, v in enumerate(polygon)] for polygon in outline]
        return _decoded(coder, coder.merge(coder.frPyObjects(moved, size, size)))
    if not isinstance(outline, Mapping):
        raise ValueError(
            f"{path}: the annotation {annotation.get('id')} needs a segmentation, polygons [[x, y, ...], ...] or run "
            f"lengths; got {outline!r}. Without masks, leave out parts=."
        )
    from PIL import Image

    height, width = int(entry["height"]), int(entry["width"])
    lengths = coder.frPyObjects(outline, height, width) if isinstance(outline["counts"], list) else outline  # pyright: ignore
    whole = Image.fromarray(_decoded(coder, lengths))
    fitted, corner = np.zeros((size, size), bool), (round(dx), round(dy))
    resized = np.asarray(whole.resize((round(width * x), round(height * y)), Image.Resampling.NEAREST)) > 0
    part = fitted[corner[1] : corner[1] + resized.shape[0], corner[0] : corner[0] + resized.shape[1]]
    part |= resized[: part.shape[0], : part.shape[1]]
    return fitted


def _decoded(coder: Any, lengths: Any) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pycocotools' array has an interface of numpy 1
        return coder.decode(lengths).astype(bool)


def _target(
    boxes: Tensor, labels: list[int], crowds: list[bool], entry: Mapping[str, Any], transform: Tensor
) -> dict[str, Any]:
    """Return the boxes to train on, clipped and without crowds, their labels, and "scored" if it differs from them."""
    scale, offset = transform.unflatten(0, (2, 2)).repeat(1, 2)
    target, crowd = torch.tensor(labels, dtype=torch.int64), torch.tensor(crowds, dtype=torch.bool)
    clipped = (_clip(boxes, entry) * scale + offset).float()
    whole = (boxes * scale + offset).float()
    empty = (whole[:, 2:] <= whole[:, :2]).any(1)
    differs = bool(crowd.any() or empty.any() or not torch.equal(clipped, whole))
    scored = {"boxes": whole, "labels": target, "crowd": crowd} if differs else None
    return {"boxes": clipped[~crowd], "labels": target[~crowd], "scored": scored}


def _corners(annotation: Mapping[str, Any], path: Path) -> list[float]:
    """Return the box of an annotation as xyxy."""
    box = annotation.get("bbox")
    numbers = isinstance(box, list) and all(isinstance(x, int | float) and math.isfinite(x) for x in box)
    if not isinstance(box, list) or len(box) != 4 or not numbers:
        raise ValueError(
            f"{path}: the annotation {annotation.get('id')} needs bbox [x, y, width, height]; got {box!r}."
        )
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]]


def _clip(boxes: Tensor, entry: Mapping[str, Any]) -> Tensor:
    """Clip boxes to the original image; empty boxes stay empty, and boxes outside stay outside after resizing.

    Clipping to the resized image is not enough: boxes must not extend into the padding of letterboxed images.
    """
    limit = boxes.new_tensor([entry["width"], entry["height"]] * 2)
    clipped = torch.minimum(boxes.clamp_min(0), limit)
    outside = (clipped[:, 2:] <= clipped[:, :2]).any(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)
    # far outside any resized image
    return torch.where(outside[:, None], boxes.new_tensor([-2e6, -2e6, -1e6, -1e6]), clipped)


def _open(entry: Mapping[str, Any], file: _Split, size: int, fit: Fit) -> tuple[np.ndarray, Tensor]:
    """Return the image (3, size, size), and the scale and offset of its boxes: (x scale, y scale, x, y)."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("images are read by Pillow: pip install 'tempering[detection]'") from error
    names = dict.fromkeys((str(entry["file_name"]), str(entry["file_name"]).replace("\\", "/")))  # written on Windows
    path = next((p for name in names for folder in file.folders if (p := folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"{file.path} lists the image {entry['file_name']}, which is not in "
            f"{', '.join(map(str, file.folders[:3]))}."
        )
    with named_if_unreadable(path), Image.open(path) as opened:
        image = rgb(opened)
        stated = (entry.get("width"), entry.get("height"))
        if image.size != stated:
            # annotations refer to the stored pixels, or to those rotated by EXIF; the stated size shows which
            image = rgb(ImageOps.exif_transpose(opened))
    if image.size != stated:
        raise ValueError(
            f"{path} is {image.size} pixels and {file.path} says {stated}, so its boxes do not fit the image."
        )
    width, height = image.size
    new = (size, size)
    if fit == "letterbox":
        scale = size / max(width, height)
        new = (max(1, round(width * scale)), max(1, round(height * scale)))
    pixels = np.full((size, size, 3), GROUND, np.uint8)
    x, y = (size - new[0]) // 2, (size - new[1]) // 2
    pixels[y : y + new[1], x : x + new[0]] = np.asarray(image.resize(new, Image.Resampling.BILINEAR))
    return pixels.transpose(2, 0, 1), torch.tensor([new[0] / width, new[1] / height, x, y])
