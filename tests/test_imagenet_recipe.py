"""The recipe imagenet: folder to weights, shards by the form of the path, the published schedule, what it refuses."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tempering.data import LazyBatches
from tempering.experiments.presets import method_of
from tempering.training.schedules import imagenet_decay
from tests.recipes import describe, run

Image = pytest.importorskip("PIL.Image", reason="Pillow makes the images")
SMALL: dict[str, Any] = {"teacher": "resnet8", "student": "resnet8", "size": 8, "batch_size": 8, "workers": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("imagenet")
    for i in range(24):
        file = root / ("train" if i < 16 else "val") / ("a", "b")[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((10, 12, 3), 200 * (i % 2) + i, np.uint8)).save(file)
    return root


def test_a_folder_to_a_student(folder: Path, tmp_path: Path) -> None:
    """The teacher is trained first, with the same recipe, and its logits are cached."""
    out = {"out": tmp_path / "runs" / "student", "epochs": 1, "quiet": True, "accelerator": "cpu", "selfcheck": False}
    done = run("imagenet", {**SMALL, **out, "data": str(folder), "teacher_cache": 1})
    assert done.facts["label"] == "KD, ImageNet weights" and done.facts["data"]["train"] == 16
    assert done.facts["teacher"]["calls"] == 16 and list((tmp_path / "runs" / "teachers").glob("answers-*"))
    assert done.facts["optimizer"][0] | {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4} == done.facts["optimizer"][0]
    assert (tmp_path / "runs" / "student" / "student.safetensors").is_file()


def test_shards_and_the_numbers_of_papers(folder: Path) -> None:
    for split in ("train", "val"):
        with tarfile.open(folder / f"{split}-0.tar", "w") as tar:
            for i, file in enumerate(sorted((folder / split).rglob("*.png"))):
                for name, content in (("png", file.read_bytes()), ("cls", str(i % 2).encode())):
                    info = tarfile.TarInfo(f"{i:03d}.{name}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    made = describe("imagenet", {**SMALL, "data": str(folder), "method": "dkd-imagenet"})
    assert isinstance(made.train, LazyBatches) and made.train.size == 16 and made.test.size == 8  # pyright: ignore
    assert made.config.epochs == 100 and made.schedule is imagenet_decay
    assert [round(imagenet_decay(e / 100), 9) for e in (29, 30, 59, 60, 89, 90)] == [1, 0.1, 0.1, 0.01, 0.01, 0.001]
    kd, dkd = (method_of(name).hyperparameters() for name in ("kd-imagenet", "dkd-imagenet"))
    assert (kd["soft"], kd["hard"], dkd["target"], dkd["non_target"], dkd["warmup"]) == (0.5, 0.5, 1, 0.5, 0.01)


def test_weights_of_imagenet_need_its_classes(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"--pretrained uses weights for ImageNet's 1,000 classes, and .* has 2"):
        describe("imagenet", {**SMALL, "data": str(folder), "dataset": "folder", "pretrained": True})
