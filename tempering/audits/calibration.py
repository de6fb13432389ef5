"""Calibration: whether a model is as sure as it is right, before and after one temperature fitted to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tempering.audits.base import Audit, Finding, answers, check_positive
from tempering.audits.intervals import Z, bootstrap

COLDEST, HOTTEST = 0.02, 50.0  # temperatures that are fitted lie between them


class Calibration(Audit):
    """ECE (equal width and adaptive), Brier score and NLL of both models, and the temperature that each would want.

    A random half of the rows is what the temperature is fitted on, the other half scores the model with it and without.
    ECE is of the predicted class's confidence.

    Args:
        bins: of the calibration errors.
        taught: temperatures the student was taught with, "student" and "teacher" -> mean, to be named beside the one
            it would want; the two are not meant to agree.
        samples: rows to look at, None for all.
        draws: resamples that an interval is made of.
        seed: of the halves and of the resamples.

    Reference: Guo et al., "On Calibration of Modern Neural Networks", 2017, arXiv:1706.04599, equations 3 and 9;
    adaptive bins (equally full ones): Nixon et al., "Measuring Calibration in Deep Learning", 2019, arXiv:1904.01685,
    of the predicted class alone.
    """

    def __init__(
        self,
        *,
        bins: int = 15,
        taught: Mapping[str, float] | None = None,
        samples: int | None = None,
        draws: int = 200,
        seed: int = 0,
    ) -> None:
        check_positive({"bins": bins, "draws": draws})
        self.bins, self.taught, self.samples, self.draws, self.seed = bins, taught, samples, draws, seed
        self._report_data: dict[str, Any] = {}

    def examine(self, models: Mapping[str, nn.Module], batches: Iterable[Any]) -> list[Finding]:
        said, y = answers(models, batches, self.samples)
        if len(y) < 4:
            raise ValueError(f"Calibration fits on one half and scores the other, of at least 4 rows; got {len(y)}.")
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(self.seed))
        fitted, held = order[: len(y) // 2], order[len(y) // 2 :]
        found: list[Finding] = []
        self._report_data = {"temperature": {}, "plain": {}, "tempered": {}}
        for side, z in said.items():
            T = fit_temperature(z[fitted], y[fitted])
            found += self._scores(side, z[held], y[held], "")
            found.append(self._temperature(side, T, len(fitted)))
            found += self._scores(side, z[held] / T.value, y[held], "_tempered")
            self._report_data["temperature"][side] = T.value
            for when, by in (("plain", 1.0), ("tempered", T.value)):
                self._report_data[when][side] = diagram(z[held] / by, y[held], bins=self.bins)
        return found

    def report_data(self, student: nn.Module) -> dict[str, Any]:
        """The reliability diagrams of the half that fits nothing, before and after the fitted temperature."""
        return {"reliability": self._report_data}

    def _scores(self, side: str, z: Tensor, y: Tensor, after: str) -> list[Finding]:
        """The four scores of these logits on the half that fits nothing."""
        logp = z.log_softmax(-1)
        confidence, predicted = logp.exp().max(-1)
        right, n = predicted == y, len(y)
        found = []
        when = " after the fitted temperature" if after else ""
        for name, adaptive, how in (("ece", False, "of equal width"), ("ece_adaptive", True, "equally full")):
            floor = noise(confidence, bins=self.bins, adaptive=adaptive, draws=self.draws, seed=self.seed)

            def of(rows: Tensor, adaptive: bool = adaptive) -> float:
                return ece(confidence[rows], right[rows], bins=self.bins, adaptive=adaptive)

            value = of(torch.arange(n))
            low, high = bootstrap(of, n, draws=self.draws, seed=self.seed, biased=True)
            meaning = (
                f"Expected calibration error{when}, {self.bins} bins {how}. A perfectly calibrated model with these "
                f"confidences would score {100 * floor.mean:.1f} % on {n} samples by noise alone, 95 % of the "
                f"time below {100 * floor.high:.1f} %: this is {'above' if value > floor.high else 'within'} it."
            )
            found.append(Finding(name + after, side, value, meaning, low, high, n, True))
        scores = {
            "brier": (brier(logp.exp(), y), f"Brier score{when}: squared distance to the one-hot label, 0 to 2."),
            "nll": (-logp.gather(1, y[:, None])[:, 0], f"Negative log-likelihood{when}, nats a sample."),
        }
        for name, (each, meaning) in scores.items():
            low, high = bootstrap(partial(_mean_of, each), n, draws=self.draws, seed=self.seed)
            found.append(Finding(name + after, side, float(each.mean()), meaning, low, high, n))
        return found

    def _temperature(self, side: str, T: Fitted, n: int) -> Finding:
        sense = (
            "too sure" if T.low > 1 else "not sure enough" if T.high < 1 else "not shown to be either too sure or not"
        )
        meaning = (
            f"The temperature that this model would want: dividing its logits by it minimizes the NLL. Above 1 a model "
            f"is too sure, below 1 not sure enough; this one is {sense}."
        )
        if T.bound:
            meaning += " It is at the edge of what is fitted: every label is among the largest logits, or none is."
        if side == "student" and self.taught:
            told = ", ".join(f"the {who}'s logits at {t:.3g}" for who, t in self.taught.items())
            meaning += f" It was taught with {told}; a temperature of teaching is not one of calibration."
        return Finding("temperature", side, T.value, meaning, T.low, T.high, n)


class Fitted(NamedTuple):
    """A fitted temperature, its interval, and whether it is at the edge of what is fitted."""

    value: float
    low: float
    high: float
    bound: bool


class Noise(NamedTuple):
    """The calibration error of a perfectly calibrated model: its mean and its 95 % quantile."""

    mean: float
    high: float


def ece(confidence: Float[Tensor, " N"], right: Bool[Tensor, " N"], *, bins: int = 15, adaptive: bool = False) -> float:
    """Expected calibration error in [0, 1]: the mean over rows of |confidence - accuracy| of the row's bin.

    Bins are of equal width, ((i-1)/bins, i/bins]; ``adaptive`` ones hold equally many rows, in order of confidence.
    """
    gap = confidence.double() - right.double()
    if adaptive:
        place = torch.empty(len(gap), dtype=torch.long)
        place[torch.argsort(confidence, stable=True)] = torch.arange(len(gap)) * bins // len(gap)
    else:
        place = _place(confidence, bins)
    return float(torch.bincount(place, gap, minlength=bins).abs().sum() / len(gap))


def diagram(z: Float[Tensor, "N C"], y: Int[Tensor, " N"], *, bins: int = 15) -> list[dict[str, float]]:
    """Confidence beside accuracy in the bins of equal width that hold a row, as records write a reliability diagram."""
    confidence, predicted = z.softmax(-1).max(-1)
    place = _place(confidence, bins)
    found = []
    for i in place.unique().tolist():
        at = place == i
        said, right = confidence[at].double().mean(), (predicted == y)[at].double().mean()
        found.append({"low": i / bins, "high": (i + 1) / bins, "count": int(at.sum())})
        found[-1] |= {"confidence": float(said), "accuracy": float(right)}
    return found


def _place(confidence: Tensor, bins: int) -> Tensor:
    return (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)


def noise(
    confidence: Float[Tensor, " N"], *, bins: int = 15, adaptive: bool = False, draws: int = 200, seed: int = 0
) -> Noise:
    """The calibration error that sampling alone makes: rows right with the probability that they say.

    Reference: the null distribution of Vaicenavicius et al., "Evaluating model calibration in classification", 2019,
    arXiv:1902.06977, section 5 (consistency resampling).
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.tensor(
        [
            ece(
                confidence, torch.rand(confidence.shape, generator=generator) < confidence, bins=bins, adaptive=adaptive
            )
            for _ in range(draws)
        ],
        dtype=torch.float64,
    )
    return Noise(float(drawn.mean()), float(drawn.quantile(0.95)))


def brier(p: Float[Tensor, "N C"], y: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Squared distance of the probabilities to the one-hot label, (N,), 0 to 2."""
    return (p**2).sum(-1) - 2 * p.gather(1, y[:, None])[:, 0] + 1


def fit_temperature(z: Float[Tensor, "N C"], y: Int[Tensor, " N"]) -> Fitted:
    """The temperature in [0.02, 50] that minimizes the NLL of z / T, with a 95 % interval.

    The NLL is convex in 1 / T: bisection on its slope, then the interval of an M-estimator (sandwich variance) there.
    """
    z = z.double() - z.double().max(-1, keepdim=True).values
    own = z.gather(1, y[:, None])[:, 0]

    def slopes(beta: float) -> tuple[Tensor, Tensor]:
        p = (beta * z).softmax(-1)
        middle = (p * z).sum(-1)
        return middle - own, (p * z**2).sum(-1) - middle**2

    cold, hot = 1 / COLDEST, 1 / HOTTEST
    low, high = hot, cold
    for _ in range(60):
        beta = (low * high) ** 0.5
        low, high = (beta, high) if float(slopes(beta)[0].mean()) < 0 else (low, beta)
    beta = (low * high) ** 0.5
    bound = beta > 0.999 * cold or beta < 1.001 * hot
    slope, bend = slopes(beta)
    curve = float(bend.mean())
    half = cold if bound or curve <= 0 else Z * float((slope**2).mean()) ** 0.5 / (curve * len(y) ** 0.5)
    return Fitted(1 / beta, 1 / min(cold, beta + half), 1 / max(hot, beta - half), bound)


def _mean_of(each: Tensor, rows: Tensor) -> float:
    return float(each[rows].mean())
