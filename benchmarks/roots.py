"""How exact the solver of Sharpness is, and how many looks it takes from a row's model: many kinds against bisection.

Usage:
    python benchmarks/roots.py [--rows 24000] [--threads 1] [--tiny]
"""

from __future__ import annotations

import csv

import torch
from timing import FACTS, arguments, machine
from torch import Tensor

from tempering.temperature import sharpness as solver

KINDS = ("gaussian", "one peak", "gamma", "all spreads")
FIELDS = ("rows", "classes", "tau", "type", "number", "one look", "two looks", "over rounding", "worst over T")


def drawn(kind: str, n: int, classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Teacher and student, (N, C) in float64."""
    z = torch.randn(2, n, classes, generator=generator, dtype=torch.float64)
    if kind == "one peak":
        z[:, torch.arange(n), torch.randint(classes, (n,), generator=generator)] += 12.0
    if kind == "gamma":
        draws = torch.rand(2, 2, n, classes, generator=generator, dtype=torch.float64).clamp_min(1e-300).log()
        z = -3.0 * draws.sum(1)
    if kind == "all spreads":
        z = 0.4 * z * 60.0 ** torch.rand(2, n, 1, generator=generator, dtype=torch.float64)
    return z[0], 0.75 * z[1]


def bisected(u: Tensor, v: Tensor, tau: float) -> Tensor:
    """The root in (-tau, tau), by the sign of the gap alone."""
    u, v = u - u.mean(-1, keepdim=True), v - v.mean(-1, keepdim=True)
    low, high = torch.full_like(u[:, :1], -tau), torch.full_like(u[:, :1], tau)
    for _ in range(54):
        middle = 0.5 * (low + high)
        gap = torch.logsumexp(u / (tau + middle), -1, keepdim=True) - torch.logsumexp(
            v / (tau - middle), -1, keepdim=True
        )
        low, high = torch.where(gap > 0, middle, low), torch.where(gap > 0, high, middle)
    return 0.5 * (low + high)


def line(kind: str, classes: int, tau: float, dtype: torch.dtype, n: int) -> dict[str, object]:
    """One line of the record: shares of rows done after one and two looks, and the largest errors.

    "over rounding" is in units of what rounding the logits and the two logsumexps changes; "worst over T" is over the
    smaller temperature.
    """
    u, v = (z.to(dtype) for z in drawn(kind, n, classes, torch.Generator().manual_seed(classes)))
    bounds = solver.Bounds(u.new_full((), tau), u.new_full((), 0.9 * tau))
    *rows, first = solver.first_look_of(u, v, *bounds)
    second = first.advance(solver.Sides(u, v, *rows), bounds)
    found = solver.solve_delta(u, v, tau=tau, solve="exact", reach=0.9).delta.double()
    u, v = u.double(), v.double()
    root = bisected(u, v, tau).clamp(-0.9 * tau, 0.9 * tau)
    T, S = tau + root, tau - root
    slope = sum(solver.look(z, t, solver.statistics(z)).mean / t for z, t in ((u, T), (v, S)))
    size = u.abs().amax(-1, keepdim=True) / T + v.abs().amax(-1, keepdim=True) / S
    rounding = torch.finfo(dtype).eps * ((1.0 + size) / slope + tau)
    error = (found - root).abs()
    values = (
        kind,
        classes,
        tau,
        str(dtype).removeprefix("torch."),
        n,
        f"{float(first.done.double().mean()):.4f}",
        f"{float(second.done.double().mean()):.4f}",
        f"{float((error / rounding).max()):.2g}",
        f"{float((error / torch.minimum(T, S)).max()):.1e}",
    )
    return dict(zip(FIELDS, values, strict=True))


def main() -> None:
    """Write roots.csv."""
    args = arguments(__doc__, rounds=1, rows=24_000).parse_args()
    torch.set_num_threads(args.threads)
    n, sizes = (50, (2, 10)) if args.tiny else (args.rows, (2, 3, 10, 100))
    facts = machine(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "roots.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer: csv.DictWriter[str] = csv.DictWriter(file, (*FIELDS, *FACTS), lineterminator="\n")
        writer.writeheader()
        for kind in KINDS:
            for classes in sizes:
                for tau, dtype in ((t, d) for t in (1.0, 4.0) for d in (torch.float32, torch.float64)):
                    made = line(kind, classes, tau, dtype, n if classes < 100 else max(n // 10, 1))
                    writer.writerow({**made, **facts})
                    print(*made.values(), flush=True)
    print(path)


if __name__ == "__main__":
    main()
