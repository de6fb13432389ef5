"""Methods with the hyperparameters that papers and released configurations give for a pair of networks.

``published.dtkd("resnet32x4", "resnet8x4")`` returns the configured method. Names are the usual ones of the field;
case, dashes and underscores do not matter. A pair without published values raises an error that lists those with
values. Only hyperparameters of the method are set; learning rates and epochs belong to the recipe.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, TypeVar

from tempering.methods.detection.fgd import FGD
from tempering.methods.detection.inconsistent import InconsistentDetection
from tempering.methods.detection.mgd import MGD
from tempering.methods.logits.ats import ATS
from tempering.methods.logits.dist import DIST
from tempering.methods.logits.dkd import DKD
from tempering.methods.logits.dtkd import DTKD
from tempering.methods.logits.erkd import ERKD
from tempering.methods.logits.kd import KD
from tempering.methods.logits.lskd import LSKD
from tempering.methods.logits.mlkd import MLKD
from tempering.methods.logits.nkd import NKD, USKD
from tempering.methods.logits.r2kd import R2KD
from tempering.methods.logits.rld import RLD
from tempering.methods.logits.ttm import TTM, WTTM
from tempering.temperature.curriculum import Curriculum
from tempering.temperature.instance import Instance
from tempering.temperature.sharpness import Sharpness
from tempering.temperature.standardized import Standardized
from tempering.temperature.static import Static
from tempering.utils.registry import plain_net

Data = Literal["cifar100", "imagenet", "tiny_imagenet", "coco"]
Pair = tuple[str, str]
Value = TypeVar("Value")

SAME: tuple[Pair, ...] = (
    ("resnet56", "resnet20"),
    ("resnet110", "resnet20"),
    ("resnet110", "resnet32"),
    ("resnet32x4", "resnet8x4"),
    ("wrn_40_2", "wrn_16_2"),
    ("wrn_40_2", "wrn_40_1"),
    ("vgg13", "vgg8"),
)
OTHER: tuple[Pair, ...] = (
    ("vgg13", "mobilenetv2"),
    ("resnet50", "mobilenetv2"),
    ("resnet32x4", "shufflev1"),
    ("resnet32x4", "shufflev2"),
    ("wrn_40_2", "shufflev1"),
)
IMAGENET: tuple[Pair, Pair] = (("resnet34", "resnet18"), ("resnet50", "mobilenetv1"))
# pairs with configurations in mdistiller and the repositories built on it
MDISTILLER = tuple(pair for pair in (*SAME, *OTHER) if pair != ("resnet110", "resnet20"))
# pairs in LSKD's logs and RLD's configurations
LATER: tuple[Pair, ...] = (
    *(pair for pair in (*SAME, *OTHER) if pair[1] != "shufflev1"),
    ("resnet32x4", "wrn_16_2"),
    ("resnet32x4", "wrn_40_2"),
    ("wrn_40_2", "resnet8x4"),
    ("wrn_40_2", "mobilenetv2"),
)


# Inconsistent KD's configurations: RetinaNet, RepPoints, and Mask R-CNN of a Cascade Mask R-CNN, all to ResNet-50
DETECTORS: tuple[Pair, Pair, Pair] = (
    ("retina_rx101", "retina_r50"),
    ("reppoints_rx101", "reppoints_r50"),
    ("cascade_mask_rcnn_rx101", "mask_rcnn_r50"),
)


class UnknownPair(ValueError):
    """Raised for a pair of networks without published values; ``known`` maps data sets to pairs with values."""

    def __init__(self, message: str, known: dict[str, list[Pair]]) -> None:
        super().__init__(message)
        self.known = known


def kd(teacher: str, student: str, *, data: Data = "cifar100") -> KD:
    """KD as mdistiller configures it: 0.9 and 0.1 at T = 4 on CIFAR-100, 0.5 and 0.5 at T = 1 on ImageNet."""
    known = {"cifar100": _all((*SAME, *OTHER), (0.9, 0.1, 4.0)), "imagenet": _all(IMAGENET, (0.5, 0.5, 1.0))}
    soft, hard, tau = _find("kd", known, teacher, student, data)
    return KD(soft=soft, hard=hard, temperature=Static(tau))


def dkd(teacher: str, student: str, *, data: Data = "cifar100") -> DKD:
    """DKD (arXiv:2203.08679), from mdistiller's configurations."""
    cifar = _all(MDISTILLER, (8.0, 4.0, 20 / 240))
    cifar |= _all((("resnet56", "resnet20"), ("resnet110", "resnet32")), (2.0, 4.0, 20 / 240))
    six_pairs = (("vgg13", "vgg8"), ("vgg13", "mobilenetv2"), ("wrn_40_2", "wrn_16_2"), ("wrn_40_2", "wrn_40_1"))
    cifar |= _all(six_pairs, (6.0, 4.0, 20 / 240))
    imagenet = {IMAGENET[0]: (0.5, 1.0, 1 / 100), IMAGENET[1]: (2.0, 1.0, 1 / 100)}
    non_target, tau, warmup = _find("dkd", {"cifar100": cifar, "imagenet": imagenet}, teacher, student, data)
    return DKD(target=1.0, non_target=non_target, hard=1.0, warmup=warmup, temperature=Static(tau))


def dtkd(teacher: str, student: str, *, data: Data = "cifar100", published: bool = False) -> DTKD:
    """DTKD (arXiv:2404.12711), from its released configurations; there is none for ImageNet.

    ``published`` uses the released code's temperatures instead of the exact ones.
    """
    cifar = _all(MDISTILLER, (3.0, 1.0))
    cifar |= _all((("resnet56", "resnet20"), ("resnet110", "resnet32"), ("wrn_40_2", "wrn_40_1")), (1.0, 0.5))
    cifar |= {("wrn_40_2", "shufflev1"): (2.0, 0.5), ("resnet50", "mobilenetv2"): (3.0, 2.0)}
    dynamic, soft = _find("dtkd", {"cifar100": cifar}, teacher, student, data)
    T = Sharpness(4.0, solve="published", differentiable=True) if published else Sharpness(4.0)
    return DTKD(dynamic=dynamic, soft=soft, hard=1.0, warmup=20 / 240, temperature=T)


def ctkd(teacher: str, student: str, *, data: Data = "cifar100") -> KD:
    """KD with a curriculum temperature (arXiv:2211.16231), global form, as released."""
    cifar = _all((*(pair for pair in SAME if pair[1] != "resnet8x4"), *OTHER), (0.9, 0.1, 10 / 240))
    known = {"cifar100": cifar, "imagenet": {IMAGENET[0]: (1.0, 1.0, 5 / 120)}}
    soft, hard, run_fraction = _find("ctkd", known, teacher, student, data)
    return KD(soft=soft, hard=hard, temperature=Curriculum(run_fraction=run_fraction))


def itkd(teacher: str, student: str, *, data: Data = "cifar100", published: bool = False) -> KD:
    """KD with instance temperatures (ITKD, arXiv:2407.00115); ``published`` uses the released code's formulas."""
    soft, hard = _find("itkd", {"cifar100": {("resnet110", "resnet20"): (0.9, 0.1)}}, teacher, student, data)
    return KD(soft=soft, hard=hard, temperature=Instance(form="published" if published else "ppo"))


def itkd_dkd(teacher: str, student: str, *, data: Data = "cifar100", published: bool = False) -> DKD:
    """DKD with instance temperatures (ITKD, arXiv:2407.00115); ``published`` uses the released code's formulas."""
    two_pairs = ("resnet56", "resnet20"), ("resnet110", "resnet32"), ("wrn_40_2", "wrn_16_2"), ("wrn_40_2", "wrn_40_1")
    cifar = _all(two_pairs, 2.0) | {("resnet32x4", "resnet8x4"): 8.0}
    non_target = _find("itkd_dkd", {"cifar100": cifar}, teacher, student, data)
    T = Instance(form="published" if published else "ppo")
    return DKD(target=1.0, non_target=non_target, hard=1.0, warmup=20 / 240, temperature=T)


def normkd() -> KD:
    """KD with temperatures proportional to the logits' standard deviation (NormKD, arXiv:2308.00520), for all pairs."""
    return KD(soft=0.9, hard=0.1, temperature=Standardized(2.0, scale="teacher", differentiable=True))


def dist(teacher: str, student: str, *, data: Data = "cifar100") -> DIST:
    """DIST (arXiv:2205.10536), for the pairs of its own tables: the same weights, T = 4 on CIFAR-100, 1 on ImageNet."""
    cifar = (
        ("wrn_40_2", "wrn_40_1"),
        ("resnet56", "resnet20"),
        ("resnet32x4", "resnet8x4"),
        ("resnet50", "mobilenetv2"),
        ("resnet32x4", "shufflev1"),
        ("resnet32x4", "shufflev2"),
    )
    known = {"cifar100": _all(cifar, 4.0), "imagenet": _all(IMAGENET, 1.0)}
    return DIST(inter=2.0, intra=2.0, hard=1.0, temperature=Static(_find("dist", known, teacher, student, data)))


_TTM: dict[Pair, tuple[float, float, float]] = {  # gamma, TTM's beta, WTTM's beta
    ("wrn_40_2", "wrn_16_2"): (0.1, 101.0, 4.0),
    ("wrn_40_2", "wrn_40_1"): (0.1, 76.0, 3.0),
    ("resnet56", "resnet20"): (0.3, 7.0, 1.5),
    ("resnet110", "resnet20"): (0.2, 8.0, 2.0),
    ("resnet110", "resnet32"): (0.1, 33.0, 1.5),
    ("resnet32x4", "resnet8x4"): (0.1, 100.0, 3.0),
    ("vgg13", "vgg8"): (0.1, 45.0, 2.25),
    ("vgg13", "mobilenetv2"): (0.2, 16.0, 3.0),
    ("resnet50", "mobilenetv2"): (0.2, 20.0, 5.0),
    ("resnet50", "vgg8"): (0.1, 70.0, 2.0),
    ("resnet32x4", "shufflev1"): (0.2, 12.0, 1.4),
    ("resnet32x4", "shufflev2"): (0.4, 40.0, 16.0),
    ("wrn_40_2", "shufflev1"): (0.3, 8.0, 3.0),
}


def ttm(teacher: str, student: str, *, data: Data = "cifar100") -> TTM:
    """TTM (arXiv:2402.11148, tables 8 and 9)."""
    gamma, beta, _ = _find("ttm", {"cifar100": _TTM}, teacher, student, data)
    return TTM(soft=beta, hard=1.0, temperature=Static(1.0 / gamma))


def wttm(teacher: str, student: str, *, data: Data = "cifar100") -> WTTM:
    """WTTM (arXiv:2402.11148, tables 8 to 10)."""
    imagenet = _all(((net, "resnet18") for net in ("resnet34", "resnet50", "resnet101", "resnet152")), (0.8, 0.0, 1.6))
    imagenet |= {IMAGENET[1]: (0.7, 0.0, 3.5)}
    gamma, _, beta = _find("wttm", {"cifar100": _TTM, "imagenet": imagenet}, teacher, student, data)
    return WTTM(soft=beta, hard=1.0, temperature=Static(1.0 / gamma))


def lskd(teacher: str, student: str, *, data: Data = "cifar100") -> LSKD:
    """KD on standardized logits (arXiv:2403.01427): weight and temperature of the released logs.

    The ImageNet values are those of the released command line and configuration.
    """
    cifar = _all(LATER, (2.0, 9.0, 0.1))
    at_three = ("vgg13", "vgg8"), ("vgg13", "mobilenetv2"), ("resnet32x4", "wrn_16_2"), ("resnet32x4", "wrn_40_2")
    cifar |= _all((*at_three, ("wrn_40_2", "mobilenetv2")), (3.0, 9.0, 0.1))
    cifar |= {("resnet50", "mobilenetv2"): (3.0, 1.0, 0.1), ("resnet110", "resnet20"): (4.0, 12.0, 0.1)}
    known = {"cifar100": cifar, "imagenet": {IMAGENET[0]: (2.0, 9.0, 1.0)}}
    tau, soft, hard = _find("lskd", known, teacher, student, data)
    return LSKD(KD(soft=soft, hard=0.0, temperature=Static(tau)), hard=hard)


def lskd_dkd(teacher: str, student: str, *, data: Data = "cifar100") -> LSKD:
    """DKD on standardized logits (arXiv:2403.01427): temperature, weight and beta of the released logs."""
    cifar = {
        ("resnet50", "mobilenetv2"): (2.0, 15.0, 2.0),
        ("resnet110", "resnet20"): (2.0, 15.0, 2.0),
        ("resnet110", "resnet32"): (2.0, 15.0, 2.0),
        ("resnet32x4", "shufflev2"): (2.0, 9.0, 8.0),
        ("resnet32x4", "resnet8x4"): (2.0, 9.0, 8.0),
        ("resnet32x4", "wrn_16_2"): (2.0, 9.0, 2.0),
        ("resnet32x4", "wrn_40_2"): (2.0, 9.0, 8.0),
        ("resnet56", "resnet20"): (3.0, 18.0, 2.0),
        ("vgg13", "mobilenetv2"): (3.0, 9.0, 2.0),
        ("vgg13", "vgg8"): (2.0, 15.0, 2.0),
        ("wrn_40_2", "mobilenetv2"): (2.0, 15.0, 2.0),
        ("wrn_40_2", "resnet8x4"): (2.0, 18.0, 2.0),
        ("wrn_40_2", "wrn_16_2"): (2.0, 12.0, 2.0),
        ("wrn_40_2", "wrn_40_1"): (2.0, 12.0, 2.0),
    }
    tau, weight, beta = _find("lskd_dkd", {"cifar100": cifar}, teacher, student, data)
    inner = DKD(target=weight, non_target=weight * beta, hard=0.0, warmup=20 / 240, temperature=Static(tau))
    return LSKD(inner, hard=1.0)


def nkd(teacher: str, student: str, *, data: Data = "cifar100") -> NKD:
    """NKD (arXiv:2303.13005), from its released configurations; CIFAR-100 has one, of the wide ResNet-34 and -18."""
    deit = ("deit3_small", "deit_tiny"), ("deit3_base", "deit_small"), ("deit3_large", "deit_base")
    imagenet = _all(IMAGENET, (1.5, 1.0)) | _all((*deit, ("deit_small", "deit_tiny")), (1.0, 1.0))
    known = {"cifar100": {("resnet34", "resnet18"): (3.5, 3.0)}, "imagenet": imagenet}
    non_target, tau = _find("nkd", known, teacher, student, data)
    return NKD(target=1.0, non_target=non_target, hard=1.0, temperature=Static(tau))


def uskd(student: str, *, names: tuple[str, ...] = (), data: Data = "cifar100") -> USKD:
    """USKD (arXiv:2303.13005), teacher-free; ``names`` is the tapped feature that the weak head reads, if any."""
    nets = "resnet18", "resnet50", "resnet101", "mobilenetv1", "mobilenetv2", "shufflev2", "regnetx_1.6gf", "swin_tiny"
    imagenet = _all((("none", net) for net in (*nets, "deit_tiny")), (1.0, 0.1, 0.005))
    known = {"cifar100": {("none", "resnet18"): (0.1, 0.1, 0.1)}, "imagenet": imagenet}
    target, non_target, weak = _find("uskd", known, "none", student, data)
    return USKD(target=target, non_target=non_target, weak=weak, hard=1.0, names=names)


def rld(teacher: str, student: str, *, data: Data = "cifar100") -> RLD:
    """RLD (arXiv:2408.07703), from its released configurations."""
    imagenet = {IMAGENET[0]: (0.5, 1.0, 1 / 100), IMAGENET[1]: (2.0, 1.0, 1 / 100)}
    known = {"cifar100": _all(LATER, (8.0, 4.0, 20 / 240)), "imagenet": imagenet}
    masked, tau, warmup = _find("rld", known, teacher, student, data)
    return RLD(sample=1.0, masked=masked, hard=1.0, warmup=warmup, temperature=Static(tau))


def erkd(teacher: str, student: str, *, data: Data = "cifar100") -> ERKD:
    """ER-KD (arXiv:2311.13621), for the pairs of its released configurations: all have the same values."""
    cifar = ("resnet32x4", "resnet8x4"), ("resnet32x4", "shufflev2"), ("vgg13", "mobilenetv2")
    known = {"cifar100": _all(cifar, 4.0), "tiny_imagenet": _all(cifar[:1], 4.0)}
    tau = _find("erkd", known, teacher, student, data)
    return ERKD(soft=0.9, hard=0.1, tau=4.0, temperature=Static(tau))


def mlkd(teacher: str, student: str, *, data: Data = "cifar100", published: bool = False) -> MLKD:
    """MLKD (CVPR 2023), from its released configurations; it needs two views: ``tasks.two_view.TwoView``."""
    imagenet = ("resnet34", "resnet18"), ("resnet50", "mobilenetv2")
    known = {"cifar100": _all(MDISTILLER, (0.9, 0.1, 4.0)), "imagenet": _all(imagenet, (0.5, 0.5, 1.0))}
    soft, hard, first = _find("mlkd", known, teacher, student, data)
    levels = (first, 3.0, 5.0, 2.0, 6.0)
    return MLKD(soft=soft, classes=soft, batch=soft, hard=hard, temperatures=levels, published=published)


def r2kd(teacher: str, student: str, *, data: Data = "tiny_imagenet", published: bool = False) -> R2KD:
    """R2KD (arXiv:2311.13934), from its released configurations, which are of Tiny-ImageNet alone.

    ``published`` uses the rank term that has no gradient. The paper's teacher is ``Ensemble([model, prune(model)],
    weights=[0.7, 0.3])``.
    """
    tiny = (
        ("resnet32x4", "resnet8x4"),
        ("resnet32x4", "shufflev2"),
        ("resnet56", "resnet20"),
        ("vgg13", "mobilenetv2"),
        ("vgg13", "vgg8"),
        ("wrn_40_2", "wrn_16_2"),
    )
    tau = _find("r2kd", {"tiny_imagenet": _all(tiny, 4.0)}, teacher, student, data)
    rank = "published" if published else "soft"
    return R2KD(value=2.0, order=2.0, hard=1.0, rank=rank, temperature=Static(tau))


def ats(teacher: str, student: str, *, data: Data = "cifar100", published: bool = False) -> ATS:
    """ATS (arXiv:2210.04427), from the authors' second release; ``published`` does not center the teacher's logits."""
    known = {"cifar100": _all((("resnet110", "vgg8"), ("resnet14", "vgg8")), (4.0, 2.0))}
    correct, wrong = _find("ats", known, teacher, student, data)
    return ATS(soft=0.5, hard=0.5, correct=correct, wrong=wrong, centered=not published)


def fgd(teacher: str, student: str, *, data: Data = "coco") -> FGD:
    """FGD (arXiv:2111.11837), from the configurations of Inconsistent KD, which are built on it."""
    known = dict(zip(DETECTORS, _FGD, strict=True))
    foreground, background, attention, relation = _find("fgd", {"coco": known}, teacher, student, data)
    return FGD(foreground=foreground, background=background, attention=attention, relation=relation)


def mgd(teacher: str, student: str, *, data: Data = "coco") -> MGD:
    """MGD (arXiv:2205.01529), from the configurations of Inconsistent KD, which are built on it."""
    feature, masked = _find("mgd", {"coco": dict(zip(DETECTORS, _MGD, strict=True))}, teacher, student, data)
    return MGD(feature=feature, masked=masked)


def inconsistent_fgd(teacher: str, student: str, *, data: Data = "coco") -> InconsistentDetection:
    """Inconsistent KD (arXiv:2209.09841) on FGD, from its released configurations."""
    weight = _find("inconsistent_fgd", {"coco": _ADVERSARIAL}, teacher, student, data)
    return InconsistentDetection(fgd(teacher, student, data=data), adversarial=weight)


def inconsistent_mgd(teacher: str, student: str, *, data: Data = "coco") -> InconsistentDetection:
    """Inconsistent KD (arXiv:2209.09841) on MGD, from its released configurations."""
    weight = _find("inconsistent_mgd", {"coco": _ADVERSARIAL}, teacher, student, data)
    return InconsistentDetection(mgd(teacher, student, data=data), adversarial=weight)


_FGD = ((1e-3, 5e-4, 5e-4, 5e-6), (1.6e-3, 8e-4, 8e-4, 8e-6), (5e-5, 2.5e-5, 5e-5, 5e-7))
_MGD = ((2e-5, 0.65), (2e-5, 0.65), (5e-7, 0.45))
_ADVERSARIAL: dict[Pair, float] = dict(zip(DETECTORS, (1e-5, 1e-5, 2.5e-7), strict=True))


def _all(pairs: Iterable[Pair], value: Value) -> dict[Pair, Value]:
    """Assign the same value to each pair."""
    return dict.fromkeys(pairs, value)


def _find(name: str, known: Mapping[str, Mapping[Pair, Value]], teacher: str, student: str, data: str) -> Value:
    """Return the values of this pair.

    Raises:
        UnknownPair: if there are none; lists the pairs with values.
    """
    for (t, s), value in known.get(data, {}).items():
        if (plain_net(t), plain_net(s)) == (plain_net(teacher), plain_net(student)):
            return value
    listing = "; ".join(f"{where}: {', '.join(f'{t} -> {s}' for t, s in pairs)}" for where, pairs in known.items())
    raise UnknownPair(
        f"published.{name} has no values for {teacher} -> {student} on {data}. It has {listing}. For another pair, "
        "configure the method itself.",
        {where: list(pairs) for where, pairs in known.items()},
    )
