"""Published accuracies for comparison. Values that could not be verified are omitted.

They use the full training recipe of the field and mostly the best epoch on the test split, over 3 to 5 runs. Papers
differ in baselines, epochs and augmentation: a value is what a paper reports, not a target for shorter training.
"""

from __future__ import annotations

from typing import NamedTuple

from tempering.utils.registry import plain_net


class Reported(NamedTuple):
    """A published top-1 accuracy in [0, 1], and its source."""

    value: float
    source: str


SOURCES = {
    "A": "CTKD's project page",
    "B": "mdistiller's README",
    "C": "logit standardization's README",
    "D": "TTM's README",
    "E": "DIST's README",
    "F": "a figure of SDD",
    "G": "WKD's README",
    "H": "ITKD, arXiv v3",
    "I": "names of ITKD's checkpoints",
    "R": "read off the chart in DTKD's README",
}
_SAME = ("resnet56 resnet20", "resnet110 resnet32", "resnet110 resnet20", "resnet32x4 resnet8x4")
_SAME = (*_SAME, "wrn_40_2 wrn_16_2", "wrn_40_2 wrn_40_1", "vgg13 vgg8")
_OTHER = ("resnet32x4 shufflev1", "resnet32x4 shufflev2", "wrn_40_2 shufflev1", "vgg13 mobilenetv2")
_OTHER = (*_OTHER, "resnet50 mobilenetv2", "resnet50 vgg8", "resnet32x4 wrn_16_2", "resnet32x4 wrn_40_2")
_OTHER = (*_OTHER, "wrn_40_2 resnet8x4", "wrn_40_2 mobilenetv2")
_DEPTHS = tuple(f"resnet{depth}" for depth in (14, 20, 32, 44, 56, 110))

# (method, pairs, accuracies in percent with "-" where unknown, source); a later line of a method adds to an earlier
_CIFAR100 = (
    ("kd", _SAME, "70.66 73.08 70.67 73.33 74.92 73.54 72.98", "D"),
    ("kd", _OTHER, "74.07 74.45 74.83 67.37 67.35 73.81 74.90 77.70 73.97 68.36", "C"),
    ("ctkd", _SAME, "71.19 73.52 70.99 - 75.45 73.93 73.52", "A"),
    ("ctkd", _SAME, "- - - 73.39 - - -", "C"),
    ("ctkd", _OTHER, "74.48 75.31 75.78 68.46 68.47 - - - - -", "A"),
    ("ctkd", _OTHER, "- - - - - - 74.57 77.66 74.61 68.34", "C"),
    ("itkd", _SAME, "- - 71.44 - - - -", "H"),
    ("dkd+itkd", _SAME, "71.89 - - - 76.08 74.90 -", "I"),
    ("dkd+itkd", _SAME, "- 74.27 - - - - -", "H"),
    ("dkd", _SAME, "71.97 74.11 71.06 76.32 76.24 74.81 74.68", "C"),
    ("dkd", _OTHER, "76.45 77.07 76.70 69.71 70.35 - 75.70 78.46 75.56 69.28", "C"),
    ("dkd", _OTHER, "- - - - - 75.34 - - - -", "F"),
    ("dkd+ctkd", _SAME, "71.65 74.02 71.70 - 75.81 74.59 -", "A"),
    ("dist", _SAME, "71.75 73.69 71.65 76.31 75.51 74.73 73.89", "D"),
    ("dist", _OTHER, "76.34 77.35 76.40 68.50 68.66 74.11 - - - -", "D"),
    ("ttm", _SAME, "71.83 73.97 71.46 76.17 76.23 74.32 74.33", "D"),
    ("ttm", _OTHER, "74.18 76.57 75.39 68.98 69.24 74.87 - - - -", "D"),
    ("wttm", _SAME, "71.92 74.13 71.67 76.06 76.37 74.58 74.44", "D"),
    ("wttm", _OTHER, "74.37 76.55 75.42 69.16 69.59 74.82 - - - -", "D"),
    ("lskd", _SAME, "71.43 74.17 71.48 76.62 76.11 74.37 74.36", "C"),
    ("lskd", _OTHER, "- 75.56 - 68.61 69.02 - 75.26 77.92 77.11 69.23", "C"),
    ("dkd+lskd", _SAME, "72.32 74.29 71.85 77.01 76.39 74.89 74.81", "C"),
    ("dkd+lskd", _OTHER, "- 77.37 - 69.98 70.45 - 76.19 78.95 76.75 70.01", "C"),
    ("mlkd", _SAME, "72.19 74.11 71.89 77.08 76.63 75.35 75.18", "C"),
    ("mlkd", _OTHER, "- 78.44 - 70.57 71.04 - 76.52 79.26 77.33 70.78", "C"),
    ("nkd", _OTHER, "75.31 76.26 75.96 68.72 69.39 74.01 - - - -", "F"),
    ("crd", _SAME, "71.16 73.48 71.46 75.51 75.48 74.14 73.94", "D"),
    ("student", _SAME, "69.06 71.14 69.06 72.50 73.26 71.98 70.36", "D"),
    ("student", _OTHER, "70.50 71.82 70.50 64.60 64.60 70.36 73.26 - 72.50 64.60", "D"),
    ("kd", tuple(f"{t} resnet8" for t in _DEPTHS), "59.10 59.26 59.13 59.17 59.96 59.63", "R"),
    ("dtkd", tuple(f"{t} resnet8" for t in _DEPTHS), "62.88 61.89 62.26 61.73 62.56 61.99", "R"),
    ("student", tuple(f"{t} resnet8" for t in _DEPTHS), "59.87 59.87 59.87 59.87 59.87 59.87", "R"),
    ("kd", tuple(f"{t} mobilenetv2" for t in _DEPTHS), "67.45 68.07 69.13 69.34 69.38 68.91", "R"),
    ("dtkd", tuple(f"{t} mobilenetv2" for t in _DEPTHS), "68.41 69.27 70.02 70.48 70.33 70.06", "R"),
    ("student", tuple(f"{t} mobilenetv2" for t in _DEPTHS), "64.60 64.60 64.60 64.60 64.60 64.60", "R"),
)
_IMAGENET = ("resnet34 resnet18", "resnet50 mobilenetv1")
_ON_IMAGENET = (
    ("kd", _IMAGENET, "71.03 70.50", "B"),
    ("ctkd", _IMAGENET, "71.32 -", "A"),
    ("dkd+ctkd", _IMAGENET, "71.51 -", "A"),
    ("dkd", _IMAGENET, "71.70 72.05", "B"),
    ("nkd", _IMAGENET, "71.96 72.58", "NKD's repository"),
    ("dist", _IMAGENET, "72.07 73.24", "E"),
    ("wttm", _IMAGENET, "72.19 73.09", "D"),
)
# label in tables -> the method above; methods with other arguments are not those of the papers
METHOD_OF_LABEL = {
    "student alone": "student",
    "kd": "kd",
    "dkd": "dkd",
    "dtkd published": "dtkd",
    "ctkd": "ctkd",
    "kd @ curriculum": "ctkd",
    "dkd @ curriculum": "dkd+ctkd",
    "itkd": "itkd",
    "kd @ instance": "itkd",
    "dkd @ instance": "dkd+itkd",
} | {name: name for name in ("dist", "ttm", "wttm", "lskd", "mlkd", "nkd")}


def _table(lines: tuple[tuple[str, tuple[str, ...], str, str], ...]) -> dict[tuple[str, str, str], Reported]:
    results: dict[tuple[str, str, str], Reported] = {}
    for method, pairs, values, source in lines:
        for pair, value in zip(pairs, values.split(), strict=True):
            if value != "-":
                teacher, student = map(plain_net, pair.split())
                results[method, teacher, student] = Reported(float(value) / 100, SOURCES.get(source, source))
    return results


PUBLISHED = {"cifar100": _table(_CIFAR100), "imagenet": _table(_ON_IMAGENET)}


def published(label: str, teacher: str, student: str, data: str) -> Reported | None:
    """Return the published accuracy for this method, pair of networks and data set, with its source; None if unknown.

    Args:
        label: label of the method in tables: "KD", "DTKD published", "dist", "student alone".
        teacher: name of the network; case, dashes and underscores do not matter.
        student: likewise.
        data: "cifar100" or "imagenet".
    """
    method = METHOD_OF_LABEL.get(" ".join(label.lower().split()))
    return PUBLISHED.get(data.lower(), {}).get((method or "", plain_net(teacher), plain_net(student)))


def reported(label: str, teacher: str, student: str, data: str) -> float | None:
    """Return the published accuracy in [0, 1] for this method; None if unknown. See ``published``."""
    result = published(label, teacher, student, data)
    return None if result is None else result.value
