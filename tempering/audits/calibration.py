"""Calibration: whether confidence matches accuracy, before and after temperature scaling."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tempering.audits.base import Audit, Finding, RowTask, check_positive, collect_logits, collect_rows, shuffled
from tempering.audits.intervals import Z, bootstrap

COLDEST, HOTTEST = 0.02, 50.0  # bounds of the fitted temperature


class Calibration(Audit):
    """Compute ECE (equal width and adaptive), Brier score and NLL of both models, and the best temperature of each.

    The temperature is fitted on a random half of the rows; the other half scores the model with and without it. ECE is
    that of the confidence in the predicted class. Findings depend neither on the order of the rows nor on batches.

    Args:
        task: converts batches to rows, such as the tokens of a text; None: batches are (inputs, labels, ...) of a
            classification.
        bins: number of bins of the calibration errors.
        temperatures: mean temperatures of the distillation, "student" and "teacher" -> mean, to be reported next to the
            fitted one; the two are not expected to agree.
        samples: number of rows, None for all.
        draws: bootstrap resamples per interval.
        seed: seed of the split into halves and of the resamples.

    Reference: Guo et al., "On Calibration of Modern Neural Networks", 2017, arXiv:1706.04599, equations 3 and 9;
    adaptive bins (equally full ones): Nixon et al., "Measuring Calibration in Deep Learning", 2019, arXiv:1904.01685,
    of the predicted class alone.
    """

    def __init__(
        self,
        *,
        bins: int = 15,
        temperatures: Mapping[str, float] | None = None,
        samples: int | None = None,
        draws: int = 200,
        seed: int = 0,
        task: RowTask | None = None,
    ) -> None:
        check_positive({"bins": bins, "draws": draws})
        self.task, self.temperatures = task, temperatures
        self.bins, self.samples, self.draws, self.seed = bins, samples, draws, seed
        self._report_data: dict[str, Any] = {}

    def examine(self, models: Mapping[str, nn.Module], batches: Iterable[Any]) -> list[Finding]:
        if self.task is None:
            logits, y = collect_logits(models, batches, self.samples)
        else:
            logits, y = collect_rows(models, batches, self.task, self.samples)
        if len(y) < 4:
            raise ValueError(f"Calibration fits on one half and scores the other, of at least 4 rows; got {len(y)}.")
        order = shuffled(logits, self.seed)
        fitted, scored = order[: len(y) // 2], order[len(y) // 2 :]
        results: list[Finding] = []
        self._report_data = {"temperature": {}, "plain": {}, "tempered": {}}
        for side, z in logits.items():
            T = fit_temperature(z[fitted], y[fitted])
            results += self._scores(side, z[scored], y[scored], "")
            results.append(self._temperature(side, T, len(fitted)))
            results += self._scores(side, z[scored] / T.value, y[scored], "_tempered")
            self._report_data["temperature"][side] = T.value
            for when, by in (("plain", 1.0), ("tempered", T.value)):
                self._report_data[when][side] = diagram(z[scored] / by, y[scored], bins=self.bins)
        return results

    def report_data(self, student: nn.Module) -> dict[str, Any]:
        """Return the reliability diagrams of the scored half, before and after temperature scaling."""
        return {"reliability": self._report_data}

    def _scores(self, side: str, z: Tensor, y: Tensor, after: str) -> list[Finding]:
        """Return the four scores of these logits on the scored half."""
        logp = z.log_softmax(-1)
        confidence, predicted = logp.exp().max(-1)
        right, n = predicted == y, len(y)
        results = []
        when = " after the fitted temperature" if after else ""
        for name, adaptive, bin_text in (("ece", False, "of equal width"), ("ece_adaptive", True, "equally full")):
            floor = noise(confidence, bins=self.bins, adaptive=adaptive, draws=self.draws, seed=self.seed)

            def statistic(rows: Tensor, adaptive: bool = adaptive) -> float:
                return ece(confidence[rows], right[rows], bins=self.bins, adaptive=adaptive)

            value = statistic(torch.arange(n))
            low, high = bootstrap(statistic, n, draws=self.draws, seed=self.seed, biased=True)
            meaning = (
                f"Expected calibration error{when}, {self.bins} bins {bin_text}. A perfectly calibrated model with "
                f"these confidences would score {100 * floor.mean:.1f} % on {n} samples by noise alone, 95 % of the "
                f"time below {100 * floor.high:.1f} %: this is {'above' if value > floor.high else 'within'} it."
            )
            results.append(Finding(name + after, side, value, meaning, low, high, n, True))
        scores = {
            "brier": (brier(logp.exp(), y), f"Brier score{when}: squared distance to the one-hot label, 0 to 2."),
            "nll": (-logp.gather(1, y[:, None])[:, 0], f"Negative log-likelihood{when}, nats per sample."),
        }
        for name, (values, meaning) in scores.items():
            low, high = bootstrap(partial(_mean_of, values), n, draws=self.draws, seed=self.seed)
            results.append(Finding(name + after, side, float(values.mean()), meaning, low, high, n))
        return results

    def _temperature(self, side: str, T: Fitted, n: int) -> Finding:
        verdict = "overconfident" if T.low > 1 else "underconfident" if T.high < 1 else "not shown to be either"
        meaning = (
            f"The temperature that calibrates this model: dividing its logits by it minimizes the NLL. Above 1 a model "
            f"is overconfident, below 1 underconfident; this one is {verdict}."
        )
        if T.bound:
            meaning += " It is at a bound of the search range: every label has the largest logit, or none has."
        if side == "student" and self.temperatures:
            temperatures = ", ".join(f"the {model}'s logits at {t:.3g}" for model, t in self.temperatures.items())
            meaning += f" It was distilled with {temperatures}; a distillation temperature is not a calibration one."
        return Finding("temperature", side, T.value, meaning, T.low, T.high, n)


class Fitted(NamedTuple):
    """A fitted temperature, its interval, and whether it is at a bound of the search range."""

    value: float
    low: float
    high: float
    bound: bool


class Noise(NamedTuple):
    """Calibration error of a perfectly calibrated model: its mean and its 95 % quantile."""

    mean: float
    high: float


def ece(confidence: Float[Tensor, " N"], right: Bool[Tensor, " N"], *, bins: int = 15, adaptive: bool = False) -> float:
    """Return the expected calibration error in [0, 1]: the mean over rows of |confidence - accuracy| of the row's bin.

    Bins have equal width, ((i-1)/bins, i/bins]; ``adaptive`` bins hold equally many rows, in order of confidence.
    """
    gap = confidence.double() - right.double()
    if adaptive:
        bin_index = torch.empty(len(gap), dtype=torch.long)
        bin_index[torch.argsort(confidence, stable=True)] = torch.arange(len(gap)) * bins // len(gap)
    else:
        bin_index = _bin_index(confidence, bins)
    return float(torch.bincount(bin_index, gap, minlength=bins).abs().sum() / len(gap))


def diagram(z: Float[Tensor, "N C"], y: Int[Tensor, " N"], *, bins: int = 15) -> list[dict[str, float]]:
    """Return confidence and accuracy of the non-empty bins of equal width, in the format of the records."""
    confidence, predicted = z.softmax(-1).max(-1)
    bin_index = _bin_index(confidence, bins)
    result = []
    for i in bin_index.unique().tolist():
        members = bin_index == i
        mean_confidence, accuracy = confidence[members].double().mean(), (predicted == y)[members].double().mean()
        result.append({"low": i / bins, "high": (i + 1) / bins, "count": int(members.sum())})
        result[-1] |= {"confidence": float(mean_confidence), "accuracy": float(accuracy)}
    return result


def _bin_index(confidence: Tensor, bins: int) -> Tensor:
    return (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)


def noise(
    confidence: Float[Tensor, " N"], *, bins: int = 15, adaptive: bool = False, draws: int = 200, seed: int = 0
) -> Noise:
    """Return the calibration error caused by sampling alone: each row is right with the probability it predicts.

    Reference: the null distribution of Vaicenavicius et al., "Evaluating model calibration in classification", 2019,
    arXiv:1902.06977, section 5 (consistency resampling).
    """
    generator = torch.Generator().manual_seed(seed)
    errors = torch.tensor(
        [
            ece(
                confidence, torch.rand(confidence.shape, generator=generator) < confidence, bins=bins, adaptive=adaptive
            )
            for _ in range(draws)
        ],
        dtype=torch.float64,
    )
    return Noise(float(errors.mean()), float(errors.quantile(0.95)))


def brier(p: Float[Tensor, "N C"], y: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return the squared distance of the probabilities to the one-hot label, (N,), 0 to 2."""
    return (p**2).sum(-1) - 2 * p.gather(1, y[:, None])[:, 0] + 1


def fit_temperature(z: Float[Tensor, "N C"], y: Int[Tensor, " N"]) -> Fitted:
    """Fit the temperature in [0.02, 50] that minimizes the NLL of z / T, with a 95 % interval.

    The NLL is convex in 1 / T: bisect on its slope, then take the interval of an M-estimator (sandwich variance).
    """
    z = (z.double() - z.double().max(-1, keepdim=True).values).clamp_min(-1e4)  # a masked class has -inf
    label_logits = z.gather(1, y[:, None])[:, 0]

    def slopes(beta: float) -> tuple[Tensor, Tensor]:
        p = (beta * z).softmax(-1)
        mean = (p * z).sum(-1)
        return mean - label_logits, (p * z**2).sum(-1) - mean**2

    cold, hot = 1 / COLDEST, 1 / HOTTEST
    low, high = hot, cold
    for _ in range(60):
        beta = (low * high) ** 0.5
        low, high = (beta, high) if float(slopes(beta)[0].mean()) < 0 else (low, beta)
    beta = (low * high) ** 0.5
    bound = beta > 0.999 * cold or beta < 1.001 * hot
    slope, curvature = slopes(beta)
    curve = float(curvature.mean())
    half = cold if bound or curve <= 0 else Z * float((slope**2).mean()) ** 0.5 / (curve * len(y) ** 0.5)
    return Fitted(1 / beta, 1 / min(cold, beta + half), 1 / max(hot, beta - half), bound)


def _mean_of(values: Tensor, rows: Tensor) -> float:
    return float(values[rows].mean())
