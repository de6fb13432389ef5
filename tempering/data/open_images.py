"""Open images of any of the forms that are decoded lazily, by the form of their path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Unpack

from tempering.data.batches import Splits
from tempering.data.lazy_huggingface import lazy_hugging_face
from tempering.data.lazy_images import LazyOptions, lazy_image_folder
from tempering.data.web_shards import webdataset

Kind = Literal["auto", "folder", "webdataset", "huggingface"]
SAVED = ("dataset_dict.json", "dataset_info.json")  # by ``save_to_disk``


def open_images(
    data: str | Path,
    *,
    size: int,
    kind: Kind = "auto",
    val: str | None = None,
    classes: Sequence[str] | int | None = None,
    length: int | None = None,
    **options: Unpack[LazyOptions],
) -> Splits[Any]:
    """Open a folder of images, tar shards, or a data set of Hugging Face; images are decoded by workers when needed.

    Args:
        data: a folder for ``lazy_image_folder``; a folder or a pattern of tar shards for ``webdataset``; the folder of
            a saved data set, or a name on the hub, which is streamed, for ``lazy_hugging_face``.
        size: height and width of the inputs in pixels.
        kind: what the data is. "auto": a saved data set or shards if the folder or the pattern is of these, else a
            folder of images; a name on the hub is opened by "huggingface" alone.
        val: pattern of the shards of the test split; None: those in the folder with "val" or "test" in their names.
        classes, length: as those functions have them.
        options: as ``lazy_image_folder`` has them.

    Raises:
        FileNotFoundError, ImportError, ValueError: as those functions do.
    """
    folder, shards = Path(data), ".tar" in str(data)
    tars = sorted(folder.glob("*.tar")) if folder.is_dir() else []
    if kind == "auto":
        saved = any((folder / name).is_file() for name in SAVED)
        kind = "huggingface" if saved else "webdataset" if shards or tars else "folder"
    if kind == "folder":
        return lazy_image_folder(folder, size=size, **options)
    if kind == "webdataset":
        held = [path for path in tars if val is None and ("val" in path.name or "test" in path.name)]
        patterns: dict[str, Any] = {"train": [path for path in tars if path not in held] or str(data)}
        patterns |= {"val": val or held} if val or held else {}
        return webdataset(patterns, size=size, classes=classes, length=length, **options)
    source: Any = data
    if not folder.is_dir():
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]

        source = load_dataset(str(data), streaming=True)
    return lazy_hugging_face(source, size=size, classes=classes, length=length, **options)
