"""Images with boxes: COCO's files in every state, batches that resume and share out, and drawn shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tempering.data.coco import GROUND, coco
from tempering.data.detection import DetectionLoader
from tempering.data.folders import pixels
from tempering.data.synthetic_shapes import SHAPES, synthetic_shapes
from tests.cases import each
from tests.paths import SHARED, needs_shared

Image = pytest.importorskip("PIL.Image")
CATEGORIES = [{"id": 7, "name": "b"}, {"id": 3, "name": "a"}]


def folder(
    root: Path, boxes: list[dict[str, Any]], *, splits: tuple[str, ...] = ("train", "test"), **more: Any
) -> Path:
    """Three images of 40 x 20, 20 x 20 in gray and 40 x 40 with a palette; the same annotations in every split."""
    (root / "images").mkdir(parents=True)
    wide = np.zeros((20, 40, 3), np.uint8)
    wide[:, :20] = 255
    Image.fromarray(wide).save(root / "images" / "wide.png")
    Image.fromarray(np.full((20, 20), 90, np.uint8)).save(root / "images" / "gray.png")
    Image.fromarray(np.full((40, 40, 3), 10, np.uint8)).convert("P").save(root / "images" / "palette.png")
    sizes = {"wide.png": (40, 20), "gray.png": (20, 20), "palette.png": (40, 40)}
    images = [{"id": i, "file_name": n, "width": w, "height": h} for i, (n, (w, h)) in enumerate(sizes.items(), 10)]
    listed = [{"id": i, "category_id": 3, "iscrowd": 0} | one for i, one in enumerate(boxes)]
    content = {"images": images, "annotations": listed, "categories": CATEGORIES} | more
    for split in splits:
        (root / f"annotations_{split}.json").write_text(json.dumps(content))
    return root


def box(image: int, *bbox: float, **more: Any) -> dict[str, Any]:
    return {"image_id": image, "bbox": list(bbox)} | more


def test_boxes_follow_their_image(tmp_path: Path) -> None:
    root = folder(tmp_path, [box(10, 20, 0, 20, 10, category_id=7), box(11, 5, 5, 10, 10)])
    train, none, test = coco(root, size=64, flip=False)
    assert none is None and train.class_names == ("a", "b") and train.size == test.size == 3
    assert [b.tolist() for b in test.boxes] == [[[32, 16, 64, 32]], [[16, 16, 48, 48]], []]
    assert [y.tolist() for y in test.labels] == [[1], [0], []]
    torch.testing.assert_close(test.scales, torch.tensor([1.6, 3.2, 1.6]))
    assert (test.images[0, :, :16] == GROUND).all() and (test.images[0, :, 17:47, :28] == 255).all()
    assert (test.images[1] == 90).all() and test.images[2].float().mean() == pytest.approx(10, abs=2)
    _, _, stretched = coco(root, size=64, fit="stretch")
    assert stretched.boxes[0].tolist() == [[32, 0, 64, 32]] and stretched.scales[0] == pytest.approx((1.6 * 3.2) ** 0.5)


def test_boxes_that_are_none(tmp_path: Path) -> None:
    """Of no size, outside, in a crowd: left out and counted. Half outside: cut, also where letterboxing has room."""
    lost = [box(10, 5, 5, 0, 9), box(10, 100, 5, 9, 9), box(10, 0, 0, 9, 9, iscrowd=1), box(10, 5, -30, 9, 9)]
    test = coco(folder(tmp_path, [*lost, box(10, -5, -5, 15, 40)]), size=64).test
    assert test.dropped == {"crowd": 1, "zero size": 1, "outside the image": 2}
    assert test.boxes[0].tolist() == [[0, 16, 16, 48]]


@each(
    "boxes, detected",
    [
        ([box(10, 0, 0, 9, 9), box(10, 20, 0, 20, 20, iscrowd=1)], {10: [(0, 0, 9, 9), (21, 1, 9, 9), (30, 10, 8, 8)]}),
        ([box(11, 2, 2, 8, 8), box(12, 0, 0, 40, 40, iscrowd=1)], {11: [(2, 2, 8, 8)], 12: [(3, 3, 20, 20)]}),
        (
            [box(11, -5, -5, 20, 20), box(11, 3, 3, 0, 9), box(12, 60, 5, 9, 9)],
            {11: [(0, 0, 15, 15)], 12: [(1, 1, 9, 9)]},
        ),
        ([box(10, 0, 0, 9, 9, category_id=7), box(12, 5, 5, 30, 30)], {10: [(0, 0, 9, 8)], 12: [(6, 5, 30, 30)]}),
    ],
    ids=[
        "a crowd of the same image",
        "an image of a crowd",
        "boxes that leave the image, or are empty",
        "none of these",
    ],
)
@pytest.mark.parametrize("fit", ["letterbox", "stretch"])
def test_scores_are_those_of_pycocotools_on_the_file(boxes: Any, detected: Any, fit: Any, tmp_path: Path) -> None:
    """Detections are given in the pixels of the file, of class 3 with falling scores."""
    pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    from tempering.tasks.average_precision import average_precision
    from tempering.tasks.detection import scored_boxes

    # pycocotools takes a match with the annotation 0 for none
    given = [one | {"id": i, "area": one["bbox"][2] * one["bbox"][3]} for i, one in enumerate(boxes, 1)]
    root = folder(tmp_path / str(len(list(tmp_path.iterdir()))), given)
    sizes, found = {10: (40, 20), 11: (20, 20), 12: (40, 40)}, []
    listed: list[dict[str, Any]] = []
    for i, (width, height) in sizes.items():
        scale = 64 / max(width, height)
        corner = ((64 - scale * width) / 2, (64 - scale * height) / 2) if fit == "letterbox" else (0.0, 0.0)
        factors = (scale, scale) if fit == "letterbox" else (64 / width, 64 / height)
        xywh = torch.tensor(detected.get(i, []), dtype=torch.float64).view(-1, 4)
        xyxy = torch.cat((xywh[:, :2], xywh[:, :2] + xywh[:, 2:]), 1)
        scores = torch.linspace(0.9, 0.6, len(xywh))
        moved = xyxy * torch.tensor(factors * 2) + torch.tensor(corner * 2)
        found.append({"boxes": moved.float(), "scores": scores, "labels": torch.zeros(len(xywh), dtype=torch.long)})
        listed += [
            {"image_id": i, "category_id": 3, "bbox": b, "score": float(score)}
            for b, score in zip(xywh.tolist(), scores, strict=True)
        ]
    truth = COCO(str(root / "annotations_test.json"))
    evaluator = COCOeval(truth, truth.loadRes(listed), "bbox")
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    _, _, test = coco(root, size=64, fit=fit)
    targets = [target for batch in test for target in batch["targets"]]
    got = average_precision(found, scored_boxes(targets), classes=2)
    assert got["map"] == pytest.approx(evaluator.stats[0], abs=1e-9)
    assert got["map50"] == pytest.approx(evaluator.stats[1], abs=1e-9)
    assert test.subset(3).identity == test.identity
    assert [t.get("scored") is None for t in targets] == [s is None for s in test._select(torch.arange(3)).scored]


def test_gray_images_of_16_bits_and_of_no_range(tmp_path: Path) -> None:
    """Their upper 8 bits count: PIL by itself would make white of them."""
    root = folder(tmp_path, [box(11, 5, 5, 10, 10)])
    deep = np.full((20, 20), 90 * 256 + 17, np.uint16)
    Image.fromarray(deep).save(root / "images" / "gray.png")
    assert (coco(root, size=64).test.images[1] == 90).all()
    for image in (Image.fromarray(deep), Image.fromarray(deep.astype(np.int32))):
        assert (pixels(image, 10) == 90).all()
    content = json.loads((root / "annotations_train.json").read_text())
    content["images"][1]["file_name"] = "gray.tiff"
    for split in ("train", "test"):
        (root / f"annotations_{split}.json").write_text(json.dumps(content))
    for broken in (deep.astype(np.float32), deep.astype(np.int32) - 9000 * 9):
        Image.fromarray(broken).save(root / "images" / "gray.tiff")
        with pytest.raises(
            ValueError, match=r"gray.tiff cannot be read .*its mode is [FI], whose values have no fixed range"
        ):
            coco(root, size=64)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"annotations": [box(10, 0, 0, 5, category_id=3)]},
            r"annotation None needs bbox \[x, y, width, height\]; got \[0, 0, 5\]",
        ),
        ({"annotations": [box(10, 0, 0, 5, float("nan"), id=4, category_id=3)]}, "annotation 4 needs bbox"),
        ({"annotations": [box(99, 0, 0, 5, 5, category_id=3)]}, "is of image 99 and category 3, and one of them"),
        ({"annotations": [box(10, 0, 0, 5, 5, category_id=1)]}, "is of image 10 and category 1, and one of them"),
        ({"images": []}, "lists no images"),
        ({"categories": [*CATEGORIES, {"id": 7, "name": "c"}]}, "has 2 categories of id 7: b, c. Give each its own id"),
        ({"categories": []}, "has no categories"),
        (
            {"images": [{"id": 1, "file_name": "wide.png", "width": 41, "height": 20}], "annotations": []},
            r"says \(41, 20\)",
        ),
        (
            {"images": [{"id": 1, "file_name": "x.png", "width": 1, "height": 1}] * 2},
            "lists two images with the same id",
        ),
    ],
)
def test_files_that_do_not_fit(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        coco(folder(tmp_path, [], **change), size=32)


def test_files_of_other_programs_are_read(tmp_path: Path) -> None:
    """Roboflow's root category, a byte order mark, and paths as Windows writes them."""
    root = {"id": 0, "name": "things", "supercategory": "none"}
    own = [{**c, "supercategory": "things"} for c in CATEGORIES]
    boxes = [box(11, 5, 5, 10, 10)]
    made = folder(tmp_path, boxes, categories=[root, *own])
    for path in made.glob("annotations_*.json"):
        content = json.loads(path.read_text())
        for entry in content["images"]:
            entry["file_name"] = f".\\{entry['file_name']}"
        path.write_text(json.dumps(content), encoding="utf-8-sig")
    train = coco(made, size=64).train
    assert train.class_names == ("a", "b") and [y.tolist() for y in train.labels] == [[], [0], []]
    used = [*boxes, box(10, 5, 5, 10, 10, category_id=0)]
    for name, more in (("used", {"categories": [root, *own]}), ("apart", {"categories": [root, *CATEGORIES]})):
        train = coco(folder(tmp_path / name, used if name == "used" else boxes, **more), size=64).train
        assert train.class_names == ("things", "a", "b"), name


def test_an_image_of_too_many_pixels_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    with pytest.raises(ValueError, match=r"\.png has too many pixels: "):
        coco(folder(tmp_path, []), size=32)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no training annotations. Expected annotations_train.json"):
        coco(tmp_path, size=32)
    root = folder(tmp_path / "a", [box(10, 0, 0, 5, 5)], splits=("train",))
    with pytest.raises(ValueError, match="a has no test split"):
        coco(root, size=32)
    held = coco(root, size=32, test=1)
    assert (held.train.size, held.test.size) == (2, 1) and not held.test.augmented
    (root / "images" / "gray.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"gray.png cannot be read as an image"):
        coco(root, size=32, test=1)
    (root / "images" / "gray.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"lists the image gray.png, which is not in .*images"):
        coco(root, size=32, test=1)
    (root / "annotations_train.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        coco(root, size=32)
    (root / "annotations_train.json").write_text("[]")
    with pytest.raises(ValueError, match="lacks images, annotations, categories"):
        coco(root, size=32)


def test_splits_of_other_classes_are_refused(tmp_path: Path) -> None:
    root = folder(tmp_path, [])
    other = json.loads((root / "annotations_test.json").read_text()) | {"categories": CATEGORIES[:1], "annotations": []}
    (root / "annotations_test.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"annotations_test.json has the categories 7=b, and .* has 3=a, 7=b"):
        coco(root, size=32)


def test_coco_s_own_layout(tmp_path: Path) -> None:
    root = folder(tmp_path, [box(10, 0, 0, 5, 5)], splits=("train",))
    (root / "annotations").mkdir()
    content = (root / "annotations_train.json").read_text()
    (root / "annotations_train.json").unlink()
    for split in ("train", "val"):
        (root / "annotations" / f"instances_{split}2017.json").write_text(content)
    (root / "images").rename(root / "train2017")
    (root / "val2017").symlink_to(root / "train2017")
    found = coco(root, size=32, subset=2)
    assert found.train.size == 2 and found.validation is None and found.test.size == 3, "val is the test split"


@needs_shared
def test_real_folders() -> None:
    found = coco(SHARED / "data" / "raccoon", size=32)
    assert (found.train.size, found.test.size) == (160, 40) and found.train.class_names == ("raccoon",)
    assert sum(map(len, found.train.boxes)) == 173 and sum(map(len, found.test.boxes)) == 44


# batches


def scenes(n: int = 10, **more: Any) -> DetectionLoader:
    """Image i is of the value i, with i % 3 boxes."""
    pixels = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 3, 8, 8).clone()
    boxes = [torch.tensor([[1.0, 1, 3 + j, 5] for j in range(i % 3)]).view(-1, 4) for i in range(n)]
    labels = [torch.arange(i % 3) for i in range(n)]
    return DetectionLoader(pixels, boxes, labels, **({"batch_size": 4, "class_names": ["a", "b"]} | more))


def flat(batch: dict[str, Any]) -> list[Tensor]:
    return [batch["images"], batch["ids"], *(t[k] for t in batch["targets"] for k in ("boxes", "labels"))]


def same(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> bool:
    return len(a) == len(b) and all(
        len(x) == len(y) and all(torch.equal(p, q) for p, q in zip(x, y, strict=True))
        for x, y in zip(map(flat, a), map(flat, b), strict=True)
    )


def jitter(image: Tensor, target: dict[str, Any], generator: torch.Generator, progress: float) -> Any:
    """Brighter by a draw, its boxes moved by it, until half of the run."""
    assert target["scale"] == 1.0
    step = int(torch.randint(1, 9, (), generator=generator)) if progress < 0.5 else 0
    return image + step, target | {"boxes": target["boxes"] + step / 4}


def test_an_epoch_goes_on_anywhere_and_comes_again() -> None:
    made = scenes(shuffle=True, flip=True, augment=[jitter], epochs=4)
    state = torch.get_rng_state()
    whole = list(made)
    assert same(whole[1:], list(made.iterate(1))) and same(whole, list(made)) and len(whole) == len(made) == 3
    assert torch.equal(state, torch.get_rng_state()), "no global random number is drawn"
    made.set_epoch(1)
    assert not same(whole, list(made)) and not same(list(scenes(shuffle=True, seed=1)), list(scenes(shuffle=True)))
    assert sorted(i for b in whole for i in b["ids"].tolist()) == list(range(10))
    for batch in whole:
        moved = (batch["images"][:, 0, 0, 0] * 255).round() - batch["ids"]
        assert (moved >= 1).all() and (moved <= 8).all()
    made.set_epoch(2)
    assert all(torch.equal((b["images"][:, 0, 0, 0] * 255).round().long(), b["ids"]) for b in made), "switched off"


def test_flips_carry_their_boxes() -> None:
    """A mark inside each box stays there, and about half of the images are flipped."""
    made = scenes(60, flip=True, batch_size=60)
    made.images[..., 1:5, 1:3] = 255
    (batch,) = made
    flipped = 0
    for image, target in zip(batch["images"], batch["targets"], strict=True):
        for x1, y1, x2, y2 in target["boxes"].long().tolist():
            inside = image[0, y1:y2, x1:x2] == 1
            assert inside.any() and (image[0] == 1).sum() == 8
            flipped += int(inside[:, -1].all() and x1 >= 3)
    assert 10 < flipped < 50


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_a_batch(world: int) -> None:
    made = scenes(shuffle=True, flip=True, augment=[jitter])
    shares = [list(made.shard(rank, world)) for rank in range(world)]
    whole = list(made)[: len(shares[0])]
    for number, batch in enumerate(whole):
        parts = [share[number] for share in shares]
        assert torch.equal(torch.cat([p["ids"] for p in parts]), batch["ids"])
        assert torch.equal(torch.cat([p["images"] for p in parts]), batch["images"])
    with pytest.raises(ValueError, match="batch_size=4 images cannot be split evenly over 3 processes"):
        made.shard(0, 3)


def test_variants() -> None:
    made = scenes(shuffle=True, flip=True, augment=[jitter], dropped={"crowd": 2})
    assert made.augmentation == {"flip": True, "augment": ["jitter"], "seed": 0, "views": None}
    assert not made.clean().augmented and next(iter(made.clean()))["ids"].tolist() == [0, 1, 2, 3]
    part, (rest, held) = made.subset(4), made.split(3)
    assert part.size == 4 and part.identity != made.identity == scenes().identity
    kept = sorted([*rest.images[:, 0, 0, 0].tolist(), *held.images[:, 0, 0, 0].tolist()])
    assert kept == list(range(10)) and (rest.size, held.size) == (7, 3)
    assert [len(b) for b in held.boxes] == [i % 3 for i in held.images[:, 0, 0, 0].tolist()]
    assert made.subset(10) is made and torch.equal(made.subset(4).images, made.subset(4).images)


def test_answers_are_not_recorded(tmp_path: Path) -> None:
    from tempering.models import build
    from tempering.teachers import Live, record

    with pytest.raises(
        ValueError, match="the outputs of a detector are feature maps, boxes and logits of every anchor, which are not"
    ):
        record(Live(build("fcos_nano", classes=2)), scenes(), tmp_path / "answers", quiet=True)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"class_names": ["a"]}, r"image 2 has the label 1 or 0, and there are 1 classes"),
        ({"batch_size": 0}, "batch_size >= 1; got 0"),
        ({"epochs": 0}, "epochs >= 1; got 0"),
        ({"scales": torch.ones(3)}, "a scale for each of 10 images"),
    ],
)
def test_scenes_that_do_not_fit(more: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        scenes(**more)


def test_boxes_and_augmentations_that_do_not_fit() -> None:
    image, label = torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    named: dict[str, Any] = {"batch_size": 1, "class_names": ["a"]}
    with pytest.raises(
        ValueError, match=r"image 0 needs boxes \(M, 4\) as xyxy and labels \(M,\); got \(4,\) and \(1,\)"
    ):
        DetectionLoader(image, [torch.zeros(4)], [label], **named)
    with pytest.raises(ValueError, match="has a box that is not finite"):
        DetectionLoader(image, [torch.full((1, 4), torch.nan)], [label], **named)
    with pytest.raises(ValueError, match="labels in int64"):
        DetectionLoader(image, [torch.zeros(1, 4)], [label.float()], **named)
    with pytest.raises(ValueError, match="in uint8, N > 0"):
        DetectionLoader(image.float(), [torch.zeros(1, 4)], [label], **named)
    with pytest.raises(ValueError, match=r"must keep an image \(3, 8, 8\) uint8; got \(3, 4, 8\)"):
        next(iter(scenes(augment=[lambda image, target, generator, progress: (image[:, :4], target)])))


# shapes


def test_shapes_are_drawn_where_they_say() -> None:
    train, none, test = synthetic_shapes(size=32, train=40, test=20, batch_size=8)
    assert none is None and train.class_names == SHAPES and train.flip and not test.augmented
    again = synthetic_shapes(size=32, train=20, test=20, seed=5)
    assert torch.equal(again.test.images, test.images) and torch.equal(again.train.images, train.images[:20])
    counts = [len(b) for b in train.boxes]
    assert 0 in counts and max(counts) > 1 and {int(y) for own in train.labels for y in own} == {0, 1, 2}
    found = 0
    for image, boxes, labels in zip(train.images.float(), train.boxes, train.labels, strict=True):
        ground = image.flatten(1).median(1).values
        for own, label in zip(boxes, labels, strict=True):
            x, y = ((own[:2] + own[2:]) / 2).long().tolist()
            # more of the class's own channel than the ground has, or another difference: it is seen at its middle
            apart = image[:, y - 1 : y + 2, x - 1 : x + 2].mean((1, 2)) - ground
            found += int(apart.abs().max() > 30)
            assert 0 <= label < 3 and (own[2:] - own[:2]).min() >= 0.16 * 32 - 1e-3
    assert found > 0.9 * sum(counts)
    with pytest.raises(ValueError, match="size >= 16"):
        synthetic_shapes(size=8)


# masks and keypoints


def outlined(root: Path) -> Path:
    """The wide image with a box drawn as a polygon and one as run lengths, both with three keypoints, and one crowd."""
    coder = pytest.importorskip("pycocotools.mask")
    whole = np.zeros((20, 40), np.uint8, order="F")
    whole[0:10, 0:20] = 1
    lengths = coder.encode(whole)
    lengths["counts"] = lengths["counts"].decode()
    polygon = [[20, 0, 40, 0, 40, 10, 20, 10]]
    points = [30, 5, 2, 20, 5, 1, 0, 0, 0]
    boxes = [
        box(10, 20, 0, 20, 10, segmentation=polygon, keypoints=points),
        box(10, 0, 0, 20, 10, segmentation=lengths, keypoints=points),
        box(10, 0, 0, 9, 9, iscrowd=1, segmentation=lengths),
    ]
    names = ["nose", "left_eye", "right_eye"]
    return folder(root, boxes, categories=[{"id": 3, "name": "a", "keypoints": names}])


def test_masks_and_keypoints_follow_their_image(tmp_path: Path) -> None:
    train, _, test = coco(outlined(tmp_path), size=64, parts=["masks", "keypoints"], batch_size=3)
    target = next(iter(test))["targets"][0]
    assert target["masks"].shape == (2, 64, 64) and target["masks"].dtype == torch.bool
    for mask, (x0, y0, x1, y1) in zip(target["masks"], target["boxes"].int().tolist(), strict=True):
        inside = torch.zeros(64, 64, dtype=torch.bool)
        inside[y0:y1, x0:x1] = True
        assert torch.equal(mask, inside)
    assert target["keypoints"][0].tolist() == [[48, 24, 2], [32, 24, 1], [0, 0, 0]]
    assert [t["masks"].shape[0] for t in next(iter(test))["targets"]] == [2, 0, 0]
    flipped = train._flipped(target)
    assert torch.equal(flipped["masks"], target["masks"].flip(-1))
    assert flipped["keypoints"][0].tolist() == [[16, 24, 2], [0, 0, 0], [32, 24, 1]], "left is right, unlabeled stays"
    assert train.subset(2).parts["masks"][0].shape[1:] == (64, 64) and train.identity != test.subset(2).identity


def test_boxes_that_are_dropped_take_their_parts_with_them() -> None:
    boxes = [torch.tensor([[40.0, 0, 50, 9], [2, 2, 9, 9]])]
    masks = torch.stack([torch.zeros(32, 32), torch.ones(32, 32)]).bool()
    points = torch.tensor([[[1.0, 1, 1]], [[5, 5, 1]]])
    given: dict[str, Any] = {"batch_size": 1, "class_names": "a", "parts": {"masks": [masks], "keypoints": [points]}}
    images, labels = torch.zeros(1, 3, 32, 32, dtype=torch.uint8), [torch.zeros(2, dtype=torch.long)]
    target = next(iter(DetectionLoader(images, boxes, labels, **given)))["targets"][0]
    assert target["masks"].all() and target["keypoints"].tolist() == [[[5, 5, 1]]]
    for message, change in {
        r"image 0 needs masks \(2, 32, 32\), one for each box; got \(1, 32, 32\)": {"parts": {"masks": [masks[:1]]}},
        r"parts 'masks' and 'keypoints', of 1 images each; got 'mask' of 1": {"parts": {"mask": [masks]}},
        "a flip exchanges left and right keypoints: give mirrored=": {"flip": True},
        "augment= changes images and boxes, not masks and keypoints": {"augment": [lambda *x: x[:2]]},
    }.items():
        with pytest.raises(ValueError, match=message):
            DetectionLoader(images, boxes, labels, **given | change)


def test_annotations_without_the_parts_are_named(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    root = folder(tmp_path, [box(10, 20, 0, 20, 10)])
    with pytest.raises(
        ValueError, match=r"the annotation 0 needs a segmentation, .*got None. Without masks, leave out"
    ):
        coco(root, size=64, parts=["masks"])
    with pytest.raises(ValueError, match=r"the annotation 0 needs keypoints \[x, y, visible, ...\], .* got None"):
        coco(root, size=64, parts=["keypoints"])
    with pytest.raises(ValueError, match="knows the parts 'masks' and 'keypoints'; got boxes"):
        coco(root, size=64, parts=["boxes"])


def test_faster_coco_eval_agrees_with_pycocotools(monkeypatch: pytest.MonkeyPatch) -> None:
    """On crowds, images without boxes or detections, equal scores, and more than 100 detections."""
    pytest.importorskip("faster_coco_eval")
    pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    from tempering.tasks import average_precision as module

    found, truth, generator = [], [], torch.Generator().manual_seed(1)
    for i, count in enumerate((3, 0, 5, 4, 1)):
        corner = torch.rand(count, 2, generator=generator) * 50
        boxes = torch.cat((corner, corner + 3 + 30 * torch.rand(count, 2, generator=generator)), 1)
        labels = torch.randint(3, (count,), generator=generator)
        truth.append({"boxes": boxes, "labels": labels, "crowd": torch.arange(count) == 2})
        times = 0 if i == 3 else 40
        noisy = boxes.repeat(times, 1) + torch.randn(count * times, 4, generator=generator)
        noisy[:, 2:] = torch.maximum(noisy[:, 2:], noisy[:, :2] + 0.5)
        scores = (torch.rand(count * times, generator=generator) * 10).round() / 10
        found.append({"boxes": noisy, "labels": labels.repeat(times), "scores": scores})
    fast = module.average_precision(found, truth, 4)
    monkeypatch.setattr(module, "_library", lambda: (COCO, COCOeval))
    slow = module.average_precision(found, truth, 4)
    assert fast["by_class"] == pytest.approx(slow["by_class"], abs=1e-9) and fast["by_class"][3] is None
    assert all(fast[name] == pytest.approx(slow[name], abs=1e-9) for name in ("map", "map50", "map75"))
    assert 0.1 < fast["map"] < 1
