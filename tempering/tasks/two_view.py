"""Two views of each batch as two blocks of rows; teacher and student may have different ones."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tempering.data.batches import labeled_batch
from tempering.rows import Rows, upcast_to_float32, without_labels
from tempering.tasks.base import Task
from tempering.tasks.classification import Classification
from tempering.utils.tensors import logits_of, numbers_on

Augment = Callable[[Tensor], Tensor]
VIEWS = ("clean", "augmented")  # names of the blocks where the copy has no labels


class TwoView(Task):
    """Classification of each batch and of an augmented copy: two blocks of rows, whose losses are added.

    MLKD and CSKD need ``TwoView(RandAugment(2, 10, mean=..., std=...))``, R2KD
    ``TwoView(CutMix(), names=("clean", "augmented"), labeled=False)``. Both views go through each model as one batch of
    2 N, so batch normalization sees them together (the released implementations call their student twice).

    Args:
        augment: maps (N, C, H, W) normalized images to augmented ones, random at every call by torch's generator.
        names: names of the two blocks.
        teacher: "same": the student's two views. "first": the batch without augmentation, whose logits are paired with
            both of the student's views; the only choice for a cached teacher. A callable: makes the teacher's own
            second view.
        labeled: whether the augmented rows keep their labels. None: unless ``augment`` mixes images, whose labels are
            not one class; -100 leaves out hard terms.
        max_augmented: number of augmented rows with weight 1, those of the largest teacher entropy (CutMixPick); the
            others have weight 0. None for all. The released code of R2KD uses the entropy of the images before mixing.

    Scores and analyses use batches without augmentation.

    Raises:
        ValueError: for invalid or incompatible options.
    """

    def __init__(
        self,
        augment: Augment,
        *,
        names: Sequence[str] = ("weak", "strong"),
        teacher: Literal["same", "first"] | Augment = "same",
        labeled: bool | None = None,
        max_augmented: int | None = None,
    ) -> None:
        mixes = bool(getattr(augment, "mixes", False))
        if not callable(augment):
            raise ValueError(f"TwoView needs a callable augment, such as CutMix(); got {augment!r}.")
        if isinstance(names, str) or len(names) != 2 or names[0] == names[1]:
            raise ValueError(f"TwoView needs two different names for its blocks; got {names!r}.")
        if not callable(teacher) and teacher not in ("same", "first"):
            raise ValueError(f"TwoView needs teacher 'same', 'first' or a callable; got {teacher!r}.")
        if mixes and teacher != "same":
            raise ValueError(f"{augment!r} mixes images, so a teacher needs the same mixed images. Use teacher='same'.")
        if mixes and labeled:
            raise ValueError(f"{augment!r} mixes images, whose label is not one class. Leave labeled=None.")
        if max_augmented is not None and max_augmented < 1:
            raise ValueError(f"TwoView needs max_augmented >= 1, or None for all; got {max_augmented!r}.")
        self.augment, self.names, self.teacher, self.max_augmented = augment, tuple(names), teacher, max_augmented
        self.labeled = not mixes if labeled is None else labeled
        self.inner = Classification()

    def inputs(self, batch: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        x, _, ids = self.inner.inputs(batch)
        if not isinstance(x, Tensor):
            raise ValueError(f"TwoView augments one tensor of inputs; got {type(x).__name__}.")
        both = torch.cat((x, self._second(self.augment, x)))
        if self.teacher == "first":
            return both, x, ids
        both_ids = None if ids is None else torch.cat((ids, ids))
        if callable(self.teacher):
            return both, torch.cat((x, self._second(self.teacher, x))), both_ids
        return both, both, both_ids

    @torch.no_grad()
    def _second(self, augment: Augment, x: Tensor) -> Tensor:
        view = augment(x)
        if view.shape != x.shape:
            raise ValueError(f"{augment!r} must keep the shape {tuple(x.shape)}; got {tuple(view.shape)}.")
        return view.to(x.dtype)

    def rows(self, student: Any, teacher: Any, batch: Any) -> list[Rows]:
        student, teacher = logits_of(student), logits_of(teacher)
        n = len(labeled_batch(batch).labels)
        teacher_views = (None, None)
        if teacher is not None:
            teacher_views = (teacher, teacher) if self.teacher == "first" else (teacher[:n], teacher[n:])
            if len(teacher_views[0]) != n or len(teacher_views[1]) != n:
                raise ValueError(
                    f"the teacher returned {len(teacher)} rows for two views of {n}. A cached teacher has no outputs "
                    "for new views: use teacher='first', or a live one."
                )
        blocks = [
            self.inner.rows(z, t, batch)[0].replace(name=name)
            for z, t, name in zip((student[:n], student[n:]), teacher_views, self.names, strict=True)
        ]
        if not self.labeled:
            assert blocks[1].target is not None
            blocks[1] = blocks[1].replace(target=without_labels(blocks[1].target))
        if self.max_augmented is not None:
            blocks[1] = blocks[1].replace(weight=self._weights_by_entropy(blocks[1].teacher))
        return blocks

    def _weights_by_entropy(self, logits: Tensor) -> Tensor:
        """Return 1 for the rows of the largest entropy and 0 for the others, (N,)."""
        logp = upcast_to_float32(logits).log_softmax(-1)
        entropy = -(logp.exp() * logp.masked_fill(torch.isneginf(logp), 0.0)).sum(-1)
        weight = torch.zeros_like(entropy)
        return weight.index_fill(0, entropy.topk(min(self.max_augmented or 0, len(entropy))).indices, 1.0)

    def row_weights(self, batch: Any) -> dict[str, float]:
        n = float(len(labeled_batch(batch).labels))
        augmented = n if self.max_augmented is None else min(float(self.max_augmented), n)
        return {self.names[0]: n, self.names[1]: augmented}

    def score(self, student: nn.Module, batches: Iterable[Any], *, teacher: Any = None) -> dict[str, float]:
        return self.inner.score(student, batches, teacher=teacher)

    def analyze(
        self, student: nn.Module, batches: Iterable[Any], *, teacher: Any = None, temperatures: Any = None
    ) -> dict[str, Any]:
        return self.inner.analyze(student, batches, teacher=teacher, temperatures=temperatures)


class _Mixing(ABC):
    """Base class of views that mix the images of a batch."""

    mixes = True

    def __init__(self, alpha: float) -> None:
        self.alpha = _check_positive(type(self).__name__, alpha=alpha)

    def __call__(self, x: Tensor) -> Tensor:
        return self.mix(x)[0]

    @abstractmethod
    def mix(self, x: Tensor) -> tuple[Tensor, Tensor, float]:
        """Return the mixed images, the index (N,) of each one's partner, and the share of the image itself."""


class MixUp(_Mixing):
    """Mixes images: lam * image + (1 - lam) * another of the batch, one lam from Beta(alpha, alpha) per batch.

    Reference: Zhang et al., ICLR 2018, arXiv:1710.09412.
    """

    def __init__(self, alpha: float = 0.2) -> None:
        super().__init__(alpha)

    def mix(self, x: Tensor) -> tuple[Tensor, Tensor, float]:
        """Return the mixed images, the index (N,) of each one's partner, and the share of the image itself."""
        lam = float(torch.distributions.Beta(self.alpha, self.alpha).sample())
        partner = torch.randperm(len(x), device=x.device)
        return torch.lerp(x[partner], x, lam), partner, lam


class CutMix(_Mixing):
    """Pastes in a rectangle of another image, of area 1 - lam, one lam from Beta(alpha, alpha) per batch.

    The rectangle is clipped at the border, as in the released code.

    Reference: Yun et al., ICCV 2019, arXiv:1905.04899.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__(alpha)

    def mix(self, x: Tensor) -> tuple[Tensor, Tensor, float]:
        """Return the mixed images, the index (N,) of each one's partner, and the share of the image that is left."""
        side = (1.0 - float(torch.distributions.Beta(self.alpha, self.alpha).sample())) ** 0.5
        spans = []
        for size in x.shape[-2:]:
            half, center = int(size * side) // 2, int(torch.randint(size, ()))
            spans.append(slice(max(center - half, 0), center + half))
        out = x.clone()
        partner = torch.randperm(len(x), device=x.device)
        out[..., spans[0], spans[1]] = x[partner][..., spans[0], spans[1]]
        area = math.prod(len(range(*span.indices(size))) for span, size in zip(spans, x.shape[-2:], strict=True))
        return out, partner, 1.0 - area / math.prod(x.shape[-2:])


class CutOut:
    """Sets a square of each image to 0 (the mean color of normalized images), at random and clipped at the border.

    The released code of R2KD has one position for the whole batch.

    Reference: DeVries & Taylor, 2017, arXiv:1708.04552.
    """

    mixes = False

    def __init__(self, size: int = 8) -> None:
        self.size = int(_check_positive("CutOut", size=size))

    def __call__(self, x: Tensor) -> Tensor:
        inside = torch.ones(len(x), 1, 1, 1, dtype=torch.bool, device=x.device)
        for dim in (-2, -1):
            length = x.shape[dim]
            start = torch.randint(length, (len(x), 1, 1, 1), device=x.device) - self.size // 2
            index = torch.arange(length, device=x.device).view((1, 1, -1, 1) if dim == -2 else (1, 1, 1, -1))
            inside = inside & (index >= start) & (index < start + self.size)
        return x.masked_fill(inside, 0.0)


class _Kornia:
    """A kornia augmentation of images that are normalized by ``mean`` and ``std`` (pixels in [0, 1] before)."""

    mixes = False

    operation: Callable[[Tensor], Tensor]

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"{type(self).__name__} needs a mean and a std > 0 per channel; got {mean!r} and {std!r}.")
        self.mean, self.std = tuple(mean), tuple(std)

    def __call__(self, x: Tensor) -> Tensor:
        mean, std = (numbers_on(v, x, torch.float32)[:, None, None] for v in (self.mean, self.std))
        return (self.operation((x.float() * std + mean).clamp(0.0, 1.0)) - mean) / std


class RandAugment(_Kornia):
    """Applies ``n`` random operations of magnitude ``m`` in (0, 30), by kornia: one choice per batch, signs per image.

    Args:
        n, m: number and magnitude of the operations; the two-view papers use 2 and 10.
        mean, std: statistics by which the images are normalized, such as ``batches.mean`` and ``batches.std``.

    Reference: Cubuk et al., 2019, arXiv:1909.13719.
    """

    def __init__(self, n: int = 2, m: int = 10, *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(mean, std)
        self.n, self.m = n, m
        self.operation = _kornia().RandAugment(n=n, m=m)


class AutoAugment(_Kornia):
    """Applies a random sub-policy of a learned policy, by kornia: one choice per batch.

    Args:
        policy: "imagenet", "cifar10" or "svhn".
        mean, std: statistics by which the images are normalized.

    Reference: Cubuk et al., CVPR 2019, arXiv:1805.09501.
    """

    def __init__(self, policy: str = "imagenet", *, mean: Sequence[float], std: Sequence[float]) -> None:
        if policy not in ("imagenet", "cifar10", "svhn"):
            raise ValueError(f"AutoAugment needs policy 'imagenet', 'cifar10' or 'svhn'; got {policy!r}.")
        super().__init__(mean, std)
        self.policy = policy
        self.operation = _kornia().AutoAugment(policy=policy)


def _kornia() -> Any:
    try:
        from kornia.augmentation import auto
    except ImportError as error:
        raise ImportError("RandAugment and AutoAugment need kornia: pip install 'tempering[views]'.") from error
    return auto


def _check_positive(owner: str, **values: float) -> float:
    ((name, value),) = values.items()
    if not value > 0:
        raise ValueError(f"{owner} needs {name} > 0; got {value!r}.")
    return value


def classification_of_views(
    views: str, features: Mapping[str, tuple[str, str]], *, mean: Sequence[float], std: Sequence[float]
) -> Task:
    """The task of a recipe's --views: batches as they come ("one"), or with an augmented copy.

    Args:
        views: "one"; "strong" is RandAugment; "cutmix", "mixup" and "cutout" leave the copy's labels out.
        features: features, for "one" alone.
        mean, std: that the images are normalized with.

    Raises:
        ValueError: for features of two views.
    """
    if views == "one":
        return Classification(features=features)
    if features:
        raise ValueError(f"--views {views} makes two blocks of rows, and features are tapped for one: --views one.")
    if views == "strong":
        return TwoView(RandAugment(2, 10, mean=mean, std=std))
    return TwoView({"cutmix": CutMix, "mixup": MixUp, "cutout": CutOut}[views](), names=VIEWS, labeled=False)
