"""Detectors: the tiny FCOS, its boxes and losses, and the wrapped ones of other libraries."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from docs.tools import detectors as detectors_tool
from tempering.models import build
from tempering.models.boxes import areas, centered, cornered, giou, iou, nms
from tempering.models.detector import Detected, Detector, detections, inherit
from tempering.models.external_detectors import TorchvisionDetector, TransformersDetector, detector, torchvision, wrap
from tempering.models.fcos import FCOS, STRIDES, assign, grid
from tempering.teachers import Live
from tempering.training.detector import distill_detector

SIZE = (64, 96)


def targets(dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    """Of three images: two boxes, none, one."""
    none = torch.zeros(0, 4, dtype=dtype), torch.zeros(0, dtype=torch.int64)
    two = torch.tensor([[10.0, 10, 50, 40], [60, 5, 80, 25]], dtype=dtype), torch.tensor([1, 2])
    one = torch.tensor([[0.0, 0, 96, 64]], dtype=dtype), torch.tensor([0])
    return [{"boxes": boxes, "labels": labels} for boxes, labels in (two, none, one)]


def images(n: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(n, 3, *SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def small(bins: int | None = None, **more: Any) -> FCOS:
    torch.manual_seed(3)
    return FCOS(3, width=0.5, neck=16, bins=bins, **more)


def added(said: Detected) -> Tensor:
    return torch.stack(list(said.losses.values())).sum(0)


# boxes


def test_overlaps_are_their_definitions() -> None:
    a = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 4], [0, 0, 0, 0], [1, 1, 3, 3]])
    b = torch.tensor([[2.0, 2, 6, 6], [4, 4, 8, 8], [0, 0, 0, 0], [0, 0, 4, 4]])
    torch.testing.assert_close(iou(a, b), torch.tensor([4 / 28, 0.0, 0.0, 4 / 16]))
    torch.testing.assert_close(giou(a, b), torch.tensor([4 / 28 - 8 / 36, -32 / 64, 0.0, 4 / 16]))
    torch.testing.assert_close(cornered(centered(b)), b)
    assert areas(torch.tensor([3.0, 3, 1, 5])) == 0


def greedy(boxes: Tensor, scores: Tensor, labels: Tensor, overlap: float) -> list[int]:
    kept: list[int] = []
    for i in scores.argsort(descending=True, stable=True).tolist():
        if all(labels[i] != labels[j] or iou(boxes[i], boxes[j]) <= overlap for j in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("seed", range(5))
def test_suppression_is_greedy_suppression(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(60, 2, generator=generator) * 20
    boxes = torch.cat((corner, corner + 1 + torch.rand(60, 2, generator=generator) * 20), 1)
    scores, labels = torch.rand(60, generator=generator), torch.randint(2, (60,), generator=generator)
    found = nms(boxes, scores, labels, overlap=0.4)
    assert found.tolist() == greedy(boxes, scores, labels, 0.4) and 2 < len(found) < 60
    assert not len(nms(boxes[:0], scores[:0], labels[:0], overlap=0.4))


# the tiny one


def test_the_zoo_has_it_small_and_wide() -> None:
    sizes = {name: sum(p.numel() for p in build(name, classes=3).parameters()) for name in ("fcos_tiny", "fcos_wide")}
    assert sizes["fcos_tiny"] < 1_000_000 < sizes["fcos_wide"]
    assert isinstance(detector("FCOS_tiny_bins", classes=2), FCOS)
    with pytest.raises(ValueError, match="resnet8 is not a detector"):
        detector("resnet8", classes=2)
    with pytest.raises(ValueError, match="channels=1"):
        build("fcos_tiny", classes=3, channels=1)


@pytest.mark.parametrize("bins", [None, 9])
def test_what_it_says(bins: int | None) -> None:
    net = small(bins)
    said = net({"images": images(), "targets": targets()})
    points = sum((SIZE[0] // s) * (SIZE[1] // s) for s in STRIDES)
    assert [tuple(x.shape) for x in said.levels] == [(3, 16, SIZE[0] // s, SIZE[1] // s) for s in STRIDES]
    assert said.logits.shape == (3, points, 3) and said.boxes.shape == (3, points, 4) and said.sigmoid
    assert (said.bins is None) == (bins is None) and (bins is None or said.bins.shape == (3, points, 4, bins))
    assert (said.boxes[..., 2:] >= said.boxes[..., :2]).all()
    assert set(said.losses) == {"class", "box", "quality"} | (set() if bins is None else {"bins"})
    assert all(loss.shape == (3,) and torch.isfinite(loss).all() for loss in said.losses.values())
    assert said.losses["box"][1] == 0 and said.losses["class"][1] > 0
    added(said).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())
    assert not net({"images": images(), "targets": None}).losses
    levels = net.eval()({"images": images(), "only": "levels"})
    torch.testing.assert_close(levels, net({"images": images()}).levels)


def test_an_image_without_boxes_still_reaches_every_weight() -> None:
    net = small(9)
    added(net({"images": images(1), "targets": targets()[1:2]})).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())
    assert net.class_head.weight.grad.abs().sum() > 0  # pyright: ignore


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_losses_are_an_images_own(norm: Any) -> None:
    """In float64, in eval mode; with group norm in training too."""
    net = small(9, norm=norm).double().train(norm == "group")
    x, truth = images(dtype=torch.float64), targets(torch.float64)
    whole = net({"images": x, "targets": truth})
    for i in range(3):
        one = net({"images": x[i : i + 1], "targets": truth[i : i + 1]})
        for name, loss in one.losses.items():
            torch.testing.assert_close(loss[0], whole.losses[name][i], rtol=0, atol=1e-12)


def test_the_attack_s_loss_is_the_class_loss_and_has_a_way_to_the_pixels() -> None:
    net, x = small().eval(), images().requires_grad_()
    inputs = {"images": x, "targets": targets()}
    torch.testing.assert_close(net.class_loss(inputs), net(inputs).losses["class"])
    torch.testing.assert_close(Detector.class_loss(net, inputs), net.class_loss(inputs))
    (gradient,) = torch.autograd.grad(net.class_loss(inputs).sum(), x)
    assert gradient.abs().sum((1, 2, 3)).gt(0).all()


def test_points_answer_for_the_smallest_box_of_their_size() -> None:
    points, strides = grid([(SIZE[0] // s, SIZE[1] // s) for s in STRIDES])
    boxes = torch.tensor([[0.0, 0, 96, 64], [20, 20, 44, 44], [1, 1, 4, 4]])
    found = assign([{"boxes": boxes, "labels": torch.tensor([0, 1, 2])}], points, strides, boxes)
    labels, inside = found.labels[0], (points[:, None] > boxes[:, :2]) & (points[:, None] < boxes[:, 2:])
    for label in (0, 1):
        own = labels == label
        assert own.any() and inside[own, label].all()
        torch.testing.assert_close(found.boxes[0, own], boxes[label].expand(int(own.sum()), 4))
    assert set(strides[labels == 1].tolist()) == {8.0} and 8.0 not in strides[labels == 0]
    assert not (labels == 2).any(), "no point lies in it"


def test_a_perfect_answer_is_found_again() -> None:
    boxes = torch.tensor([[[10.0, 10, 50, 40], [11, 11, 51, 41], [10, 10, 50, 40], [-9, 5, 20, 200]]])
    logits = torch.tensor([[[4.0, -9], [3, -9], [-9, 2], [-9, 1]]])
    said = Detected([], logits, boxes, None, {}, True)
    (found,) = detections(said, SIZE)
    assert found["labels"].tolist() == [0, 1, 1] and found["scores"].tolist() == sorted(found["scores"], reverse=True)
    assert found["boxes"][2].tolist() == [0, 5, 20, 64]
    assert len(detections(said._replace(queries=True), SIZE)[0]["labels"]) == 4
    assert len(detections(said, SIZE, max_detections=1)[0]["labels"]) == 1
    assert not len(detections(said, SIZE, score=0.999)[0]["labels"])
    soft = said._replace(sigmoid=False, logits=torch.cat((logits, torch.full((1, 4, 1), 9.0)), -1))
    assert not len(detections(soft, SIZE)[0]["labels"]), "all background"


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"multiples of 32; got \(1, 3, 60, 96\)"):
        small()({"images": torch.rand(1, 3, 60, 96)})
    with pytest.raises(ValueError, match="neck a multiple of 8"):
        FCOS(3, neck=20)
    with pytest.raises(ValueError, match="norm 'batch' or 'group'"):
        FCOS(3, norm="layer")  # pyright: ignore


def test_a_teacher_s_wrapper_passes_it_on() -> None:
    said = Live(small(), precision="bf16")({"images": images(), "targets": None})
    assert isinstance(said, Detected) and said.logits.dtype == torch.float32 and said.levels[0].dtype == torch.float32
    assert not said.logits.requires_grad


def test_neck_and_head_are_inherited_where_they_fit() -> None:
    torch.manual_seed(1)
    teacher, student = FCOS(3, width=1.0, neck=16), FCOS(3, width=0.5, neck=16)
    before = copy.deepcopy(student.state_dict())
    left = inherit(student, teacher)
    assert left and all(name.startswith("laterals") and name.endswith("weight") for name in left)
    torch.testing.assert_close(student.class_tower.state_dict(), teacher.class_tower.state_dict())
    torch.testing.assert_close(
        student.stem.state_dict(), {k[5:]: v for k, v in before.items() if k.startswith("stem.")}
    )
    with pytest.raises(ValueError, match="cannot inherit"):
        inherit(student, TransformersDetector(tiny("d_fine")))


# boxes that are none, and images that are gray


def odd(net: Detector) -> None:
    """Boxes of no size, outside and turned round change nothing; without any other the image has none."""
    good = targets()[0]
    none = torch.tensor([[20.0, 20, 20, 30], [100, 10, 140, 50], [-9, 5, 0, 9], [50, 40, 50, 40]])
    mixed = {"boxes": torch.cat((none, good["boxes"])), "labels": torch.cat((torch.full((4,), 2), good["labels"]))}
    net.eval()
    for given, want in ((mixed, good), ({"boxes": none, "labels": torch.full((4,), 2)}, targets()[1])):
        got, plain = (net({"images": images(1), "targets": [t]}) for t in (given, want))
        torch.testing.assert_close(got.losses, plain.losses)
        assert added(got).isfinite().all()
        torch.testing.assert_close(net.class_loss({"images": images(1), "targets": [given]}), got.losses["class"])
    added(got).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.filterwarnings("ignore:there are boxes outside of their image")
def test_odd_boxes_are_none() -> None:
    odd(small(9))
    # one that reaches over the edge has the points within
    over = {"boxes": torch.tensor([[60.0, 20, 150, 90]]), "labels": torch.tensor([0])}
    said = small()({"images": images(1), "targets": [over]})
    assert added(said).isfinite().all() and said.losses["box"] > 0


def test_targets_of_other_images_or_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="needs targets for every image; got 3 images and 2"):
        small()({"images": images(), "targets": targets()[:2]})
    for wrong in (3, -1):
        other = {"boxes": targets()[2]["boxes"], "labels": torch.tensor([wrong])}
        with pytest.raises(ValueError, match=rf"has 3 classes, counted from 0, .* from {wrong} to {wrong}. Build it"):
            small()({"images": images(1), "targets": [other]})
    with pytest.raises(ValueError, match=r"images \(B, 3, H, W\) .* got \(3, 1, 64, 96\)"):
        small()({"images": images()[:, :1], "targets": targets()})


# other libraries


def needs_transformers() -> Any:
    with contextlib.suppress(ImportError):
        torchvision()
    return pytest.importorskip("transformers")


def tiny(kind: str) -> Any:
    """A transformers detector of under half a million parameters."""
    needs_transformers()
    return detectors_tool.tiny(kind)


@pytest.mark.filterwarnings("ignore:there are boxes outside of their image")
@pytest.mark.parametrize("kind", ["d_fine", "rt_detr", "rt_detr_v2", "detr", "conditional_detr", "deformable_detr"])
def test_transformers_detectors(kind: str) -> None:
    net = TransformersDetector(tiny(kind)).eval()
    said = net({"images": images(), "targets": targets()})
    assert said.queries and said.sigmoid == (kind != "detr") and said.foreground.shape == (3, 20, 3)
    strides = {"detr": [32], "conditional_detr": [32], "deformable_detr": [*STRIDES, 64]}.get(kind, STRIDES)
    assert [x.shape[2:] for x in said.levels] == [(-(-SIZE[0] // s), -(-SIZE[1] // s)) for s in strides]
    assert said.boxes.shape == (3, 20, 4) and 1.0 < said.boxes.amax() < 1.5 * max(SIZE)
    assert (said.bins is not None) == (kind == "d_fine")
    for i in range(3):
        one = net({"images": images()[i : i + 1], "targets": targets()[i : i + 1]})
        torch.testing.assert_close(added(one)[0], added(said)[i], rtol=1e-4, atol=1e-4)
    own = net.model(net.normalized(images()[:1]), labels=labels(targets()[:1]))
    torch.testing.assert_close(own.loss, added(said)[0], rtol=1e-4, atol=1e-4)
    added(net.train()({"images": images(), "targets": targets()})).sum().backward()
    idle = [n for n, p in net.named_parameters() if p.requires_grad and p.grad is None]
    assert not [n for n in idle if not n.endswith(("reg_scale", "up"))]
    assert net.class_loss({"images": images(), "targets": targets()}).shape == (3,)
    assert not inherit(TransformersDetector(tiny(kind)), net)
    odd(net)
    gray = images()[:, :1]
    torch.testing.assert_close(net({"images": gray}).logits, net({"images": gray.expand(-1, 3, -1, -1)}).logits)


def labels(truth: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    scale = torch.tensor([SIZE[1], SIZE[0], SIZE[1], SIZE[0]])
    return [{"class_labels": t["labels"], "boxes": centered(t["boxes"] / scale)} for t in truth]


def test_other_transformers_are_refused() -> None:
    transformers = needs_transformers()
    config = transformers.YolosConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16)
    with pytest.raises(TypeError, match=r"wraps d_fine, rt_detr, .* got yolos"):
        TransformersDetector(transformers.YolosForObjectDetection(config))


@pytest.fixture(scope="module")
def library() -> Any:
    try:
        return torchvision()
    except ImportError as error:
        pytest.skip(str(error))


class Pyramid(torch.nn.Module):
    """Two levels of 32 channels, as torchvision wants a backbone."""

    out_channels = 32

    def __init__(self) -> None:
        super().__init__()
        self.fpn = torch.nn.ModuleList(torch.nn.Conv2d(a, 32, 3, s, 1) for a, s in ((3, 8), (32, 2)))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first = self.fpn[0](x)
        return {"0": first, "1": self.fpn[1](first)}


@pytest.mark.filterwarnings("ignore:there are boxes outside of their image")
@pytest.mark.parametrize("kind", ["FCOS", "RetinaNet"])
def test_torchvision_detectors(kind: str, library: Any) -> None:
    from torchvision.models import detection  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    anchors = detection.anchor_utils.AnchorGenerator(((8,), (16,)), ((1.0,),) * 2)
    net = TorchvisionDetector(getattr(detection, kind)(Pyramid(), 3, anchor_generator=anchors)).eval()
    said = net({"images": images(), "targets": targets()})
    count = sum((SIZE[0] // s) * (SIZE[1] // s) for s in (8, 16))
    assert said.logits.shape == (3, count, 3) and said.boxes.shape == (3, count, 4) and len(said.levels) == 2
    assert (said.quality is not None) == (kind == "FCOS")
    for i in range(3):
        one = net({"images": images()[i : i + 1], "targets": targets()[i : i + 1]})
        torch.testing.assert_close(added(one)[0], added(said)[i])
    added(said).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    assert len(detections(said, SIZE)) == 3 and net.class_loss({"images": images(), "targets": targets()}).shape == (3,)
    odd(net)


def two_stage(kind: str) -> Any:
    """A tiny Faster, Mask or Keypoint R-CNN of three classes; the last with five keypoints."""
    from torchvision.models import detection  # pyright: ignore[reportMissingImports]
    from torchvision.ops import MultiScaleRoIAlign  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)

    def pool(size: int) -> Any:
        return MultiScaleRoIAlign(["0", "1"], size, 1)

    parts: dict[str, Any] = {
        "rpn_anchor_generator": detection.anchor_utils.AnchorGenerator(((16,), (32,)), ((1.0,),) * 2),
        "box_roi_pool": pool(3),
        "box_head": detection.faster_rcnn.TwoMLPHead(32 * 9, 16),
        "box_predictor": detection.faster_rcnn.FastRCNNPredictor(16, 4),
        **{f"rpn_{when}_nms_top_n_{mode}": 20 for when in ("pre", "post") for mode in ("train", "test")},
        "rpn_batch_size_per_image": 16,
        "box_batch_size_per_image": 16,
    }
    if kind == "MaskRCNN":
        parts |= {"mask_roi_pool": pool(4), "mask_head": detection.mask_rcnn.MaskRCNNHeads(32, (8,), 1)}
        parts["mask_predictor"] = detection.mask_rcnn.MaskRCNNPredictor(8, 8, 4)
    if kind == "KeypointRCNN":
        parts |= {"keypoint_roi_pool": pool(4), "keypoint_head": detection.keypoint_rcnn.KeypointRCNNHeads(32, (8,))}
        parts["keypoint_predictor"] = detection.keypoint_rcnn.KeypointRCNNPredictor(8, 5)
    return getattr(detection, kind)(Pyramid(), **parts)


def with_parts(net: Detector) -> list[dict[str, Tensor]]:
    """The targets, with the masks or keypoints that the detector needs."""
    made, generator = targets(), torch.Generator().manual_seed(2)
    for target in made:
        count = len(target["labels"])
        if "masks" in net.needs:
            target["masks"] = torch.rand(count, *SIZE, generator=generator) > 0.5
        if "keypoints" in net.needs:
            points = torch.rand(count, 5, 2, generator=generator) * 60
            target["keypoints"] = torch.cat((points, torch.ones(count, 5, 1)), -1)
    return made


@pytest.mark.parametrize(("kind", "extra"), [("FasterRCNN", None), ("MaskRCNN", "mask"), ("KeypointRCNN", "keypoint")])
def test_two_stage_detectors_train_with_their_own_losses(kind: str, extra: str | None, library: Any) -> None:
    net = wrap(two_stage(kind)).eval()
    truth, state = with_parts(net), torch.get_rng_state()
    said = net({"images": images(), "targets": truth})
    assert torch.equal(state, torch.get_rng_state()) and net.classes == 3 and net.family == "two-stage"
    names = {"class", "box", "class_proposals", "box_proposals"} | ({extra} if extra else set())
    assert set(said.losses) == names and said.logits.shape == (3, 120, 1) and len(said.levels) == 2
    own: Any = net.model
    own.transform.min_size, own.transform.max_size = (SIZE[0],), SIZE[1]
    for i in range(3):
        own.training = own.rpn.training = own.roi_heads.training = True
        torch.manual_seed(0)
        want = own([images()[i]], [{n: x + 1 if n == "labels" else x.clone() for n, x in truth[i].items()}])
        torch.testing.assert_close(added(said)[i], torch.stack(list(want.values())).sum(), rtol=1e-5, atol=1e-6)
        own.training = own.rpn.training = own.roi_heads.training = False
    (found, *_), (want, *_) = detections(said, SIZE, score=0.0), own([images()[0]])
    torch.testing.assert_close(found["boxes"], want["boxes"], rtol=1e-4, atol=1e-4)
    assert torch.equal(found["labels"], want["labels"] - 1) and len(found["labels"]) > 5
    if extra == "mask":
        torch.testing.assert_close(found["masks"], want["masks"][:, 0] >= 0.5)
    if extra:
        bare = [{name: target[name] for name in ("boxes", "labels")} for target in truth]
        with pytest.raises(
            ValueError, match=rf"trained on {extra}s: each target needs '{extra}s' \(2, .* got {{'boxes'"
        ):
            net({"images": images(), "targets": bare})
    added(net.train()({"images": images(), "targets": truth})).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_two_stage_detectors_are_distilled(library: Any) -> None:
    """FGD over the necks, on images of which one has no box, and scores of the model's own detections."""
    pytest.importorskip("pycocotools")
    student, teacher = two_stage("MaskRCNN"), two_stage("MaskRCNN")
    batch = {"images": images(), "targets": with_parts(wrap(student))}
    run = distill_detector(student, teacher, [batch], test=[batch], steps=1, quiet=True, skip_checks=["above chance"])
    assert run.facts["method"]["foreground"] == 5e-5 and 0 <= run.last["test"]["map"] <= 1
    assert run.student.model is student  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.filterwarnings("ignore:there are boxes outside of their image")
def test_ssd_trains_with_its_own_losses(library: Any) -> None:
    from torchvision.models import detection  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    anchors = detection.anchor_utils.DefaultBoxGenerator([[2], [2]], scales=[0.2, 0.5, 0.8])
    head = detection.ssd.SSDHead([32, 32], [4, 4], 4)
    net = wrap(detection.ssd.SSD(Pyramid(), anchors, SIZE, 4, head=head)).eval()
    assert net.classes == 3 and net.family == "anchor-based" and net.image_size == SIZE[0]
    said = net({"images": images(), "targets": targets()})
    assert not said.sigmoid and said.foreground.shape[-1] == 3
    own: Any = net.model
    own.transform.fixed_size = (SIZE[1], SIZE[0])
    for i in range(3):
        own.training = True
        want = own([images()[i]], [{n: x + 1 if n == "labels" else x.clone() for n, x in targets()[i].items()}])
        torch.testing.assert_close(added(said)[i], want["classification"] + want["bbox_regression"])
    own.training = False
    (found, *_), (want, *_) = detections(said, SIZE, score=0.01, overlap=own.nms_thresh), own([images()[0]])
    torch.testing.assert_close(found["scores"][:20], want["scores"][:20])
    assert torch.equal(found["labels"][:20], want["labels"][:20] - 1)
    odd(net)


def test_what_is_no_detector_is_refused(library: Any) -> None:
    with pytest.raises(TypeError, match=r"Linear is no detector that is supported: those are .* needs a subclass of"):
        wrap(torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="wraps FCOS, RetinaNet and SSD; got Linear"):
        TorchvisionDetector(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="has no detector 'resnet18'; it has fasterrcnn"):
        detector("torchvision:resnet18", classes=3)
