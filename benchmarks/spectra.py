"""What Inconsistent KD does to the spectra of images: noise, crop and the teacher's adversaries beside the images.

Trains a teacher first, by the recipe detection and once. Noise and crop are made of every image, whatever the size of
its objects. The figures come with the numbers, in a record of what they were made of.

Usage:
    python benchmarks/spectra.py [--data DIR] [--size 160] [--epochs 8] [--images 64]
    python benchmarks/spectra.py --figures docs/figures/detection --out benchmarks/results/detection-spectra
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from timing import ROOT, machine
from torch import Tensor, nn

from tempering.data.coco import coco
from tempering.data.detection import DetectionLoader
from tempering.data.inconsistent import SampleSpecific
from tempering.data.spectrum import spectrum
from tempering.data.synthetic_shapes import synthetic_shapes
from tempering.experiments.recipe import find, with_flags
from tempering.experiments.recipe import load as load_recipe
from tempering.methods import InconsistentDetection
from tempering.models import load
from tempering.models.external_detectors import detector
from tempering.reports.spectra import write_spectra

ALL_SMALL, NONE_SMALL = 1e6, 0.0  # limits that make noise, or the crop, of any image


def trained(args: argparse.Namespace, classes: int) -> tuple[nn.Module, dict[str, float]]:
    """The teacher, from its folder where it was trained before, and its scores on the test split."""
    folder = (
        args.runs / f"{args.teacher}-{args.data.resolve().name if args.data else 'shapes'}-{args.size}-{args.epochs}"
    )
    settings: dict[str, Any] = {"data": args.data, "size": args.size, "epochs": args.epochs, "subset": args.subset}
    settings |= {
        "resize_mode": "stretch",
        "evaluate_every": args.epochs,
        "threads": args.threads,
        "quiet": True,
        "out": folder,
    }
    settings |= {"method": "supervised", "student": args.teacher}
    run = with_flags(load_recipe(find("detection")), settings).run()
    net = detector(args.teacher, classes=classes)
    load(net, folder / "student.safetensors")
    return net.eval().requires_grad_(False), run.last["test"]


def changed(scenes: DetectionLoader, augment: SampleSpecific) -> list[Tensor]:
    """Every image as the augmentation leaves it, (3, H, W) in [0, 1]."""
    out = []
    for i, image in enumerate(scenes.images):
        target = {"boxes": scenes.boxes[i], "labels": scenes.labels[i]}
        out.append(augment(image, target, torch.Generator().manual_seed(i))[0] / 255)
    return out


def kinds(scenes: DetectionLoader, teacher: nn.Module) -> dict[str, list[Tensor]]:
    """Kind -> its images."""
    method = InconsistentDetection()
    method.bind_teacher(teacher)
    adversaries = [x for batch in scenes for x in method.adversaries(batch["images"], batch["targets"])]
    return {
        "as they are": [image / 255 for image in scenes.images],
        "crop": changed(scenes, SampleSpecific(small=NONE_SMALL)),
        "noise": changed(scenes, SampleSpecific(small=ALL_SMALL, probability=1.0)),
        "adversaries": adversaries,
    }


def main(argv: list[str] | None = None) -> None:
    """The teacher, the four kinds of images, and what there is to see of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=None, help="folder in COCO's format; by itself shapes")
    parser.add_argument("--size", type=int, default=160, help="pixels a side")
    parser.add_argument("--images", type=int, default=64, help="of the test split")
    parser.add_argument("--teacher", default="fcos_tiny")
    parser.add_argument("--epochs", type=int, default=8, help="of the teacher")
    parser.add_argument("--subset", type=int, default=None, help="images that the teacher is trained on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "spectra", help="where the teacher lies")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "detection-spectra")
    parser.add_argument("--figures", type=Path, default=ROOT / "docs" / "figures" / "detection")
    args = parser.parse_args(argv)
    splits = coco(args.data, size=args.size, fit="stretch") if args.data else synthetic_shapes(size=args.size)
    scenes = splits.test.clean().subset(min(args.images, splits.test.size))
    teacher, scores = trained(args, scenes.classes)
    found = {kind: spectrum(images) for kind, images in kinds(scenes, teacher).items()}
    write_spectra(found, args.figures)
    args.out.mkdir(parents=True, exist_ok=True)
    made = {"data": scenes.name, "size": args.size, "teacher": args.teacher, "epochs": args.epochs, "scores": scores}
    record = {**made, **machine(args.threads), "spectra": found}
    (args.out / "spectra.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for kind, said in found.items():
        print(f"{kind:12} {said['images']} images, {100 * said['high']:.2f} % of the power in high frequencies")


if __name__ == "__main__":
    main()
