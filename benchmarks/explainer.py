"""What hard labels, label smoothing and KD make an explainer attend to: routing entropies, trees, accuracy, over seeds.

Trains on the bundled digits, in minutes, and writes one record a run; the page and its figures come from the records.

Usage:
    python benchmarks/explainer.py [--epochs 30] [--seeds 3] [--out benchmarks/results/explainer-digits]
    python benchmarks/explainer.py --page-only
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from budget import markdown
from timing import ROOT, machine

from tempering import distill
from tempering.audits.trees import compared
from tempering.data import digits
from tempering.methods import Explainer, Supervised  # pyright: ignore[reportAttributeAccessIssue]
from tempering.models import build
from tempering.models.explainer import adam, rate
from tempering.reports.intervals import Difference, difference
from tempering.reports.trees import write_figures

VARIANTS: dict[str, dict[str, float]] = {
    "hard labels": {"soft": 0.0, "hard": 1.0},
    "label smoothing": {"soft": 0.0, "hard": 1.0, "smoothing": 0.1},
    "KD": {},
}
RESULTS = ROOT / "benchmarks" / "results" / "explainer-digits"
KEYS = {"entropy": "at the temperature the run ended with", "entropy_unannealed": "at temperature 1"}


def train(seed: int, epochs: int, teacher: torch.nn.Module) -> dict[str, tuple[torch.nn.Module, float]]:
    """Variant -> its trained explainer and test accuracy; weights and order are the same in every variant."""
    out = {}
    for name, how in VARIANTS.items():
        data = digits(batch_size=64, seed=seed)
        torch.manual_seed(seed)
        net = build("explainer_digits", classes=10, channels=1)
        run = distill(
            net,
            None if how else teacher,
            data.train,
            method=Explainer(**how),
            optimizer=partial(adam, net=net),
            schedule=rate,
            epochs=epochs,
            evaluate_every=epochs,
            test=data.test,
            seed=seed,
            selfcheck=False,
            quiet=True,
        )
        out[name] = (net, run.last["test"]["accuracy"])
    return out


def record(folder: Path, seeds: int, epochs: int) -> None:
    """A record a seed, those that are there left alone; figures of seed 0."""
    data = digits(batch_size=64, seed=0)
    torch.manual_seed(0)
    teacher = build("digits_large", classes=10, channels=1)
    taught = distill(teacher, None, data.train, method=Supervised(), epochs=15, test=data.test, seed=0, quiet=True)
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(seeds):
        path = folder / f"seed-{seed}.json"
        if path.is_file():
            continue
        nets = train(seed, epochs, teacher)
        found = compared({name: net for name, (net, _) in nets.items()})
        if seed == 0:
            write_figures(found, folder)
        line: dict[str, Any] = {"seed": seed, "epochs": epochs, "teacher": taught.last["test"]["accuracy"]}
        line |= {"accuracy": {name: score for name, (_, score) in nets.items()}, "found": found, **machine(1)}
        path.write_text(json.dumps(line, indent=1) + "\n", encoding="utf-8")
        print(path, flush=True)


def page(folder: Path) -> str:
    """The tables, from the records alone."""
    seeds = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("seed-*.json"))]
    first = seeds[0]
    out = [
        "# What hard labels, label smoothing and KD make an explainer attend to",
        f"Made by `python benchmarks/explainer.py` from {len(seeds)} seeds: `explainer_digits` on scikit-learn's "
        f"digits, {first['epochs']} epochs, Adam at the code's rates; teacher {100 * first['teacher']:.1f} % at test. "
        "Mean entropy in nats of a level's routing rows, ± sample standard deviation; below it the difference to hard "
        "labels paired by seed, with the half-width of its 95 % interval.",
    ]
    for key, said in KEYS.items():
        levels = list(first["found"][key]["KD"])
        out += [f"**Routing entropy {said}**", markdown(["method", *levels], _rows(seeds, key, levels))]
    most = ", ".join(f"{name} {value:.2f}" for name, value in first["found"]["most"].items())
    scores = {name: [100 * seed["accuracy"][name] for seed in seeds] for name in VARIANTS}
    out += [
        f"A row that takes all its parents evenly has: {most}.",
        markdown(["method", "test accuracy (%)"], [[name, _spread(values)] for name, values in scores.items()]),
        "**How alike the groupings of classes are** (adjusted Rand index, 1 for the same, 0 for chance)",
        markdown(["pair", *first["found"]["alike"]], _alike(seeds)),
        "![entropies](routing-unannealed.svg)",
        "Trees of seed 0: " + ", ".join(f"[{p.stem}]({p.name})" for p in sorted(folder.glob("tree-*.svg"))) + ".",
        "What it does not show: anything of CIFAR, of larger explainers or of 300 epochs. The schedule of the "
        "routing's temperature lowers entropies by itself, alike in every variant, which is why both are shown.",
    ]
    return "\n\n".join(out) + "\n"


def _rows(seeds: list[dict[str, Any]], key: str, levels: list[str]) -> list[list[str]]:
    values = {name: {level: [s["found"][key][name][level] for s in seeds] for level in levels} for name in VARIANTS}
    rows = []
    for name, own in values.items():
        rows.append([name, *(_spread(own[level]) for level in levels)])
        if name != "hard labels" and len(seeds) > 1:
            gaps = [
                difference(dict(enumerate(own[level])), dict(enumerate(values["hard labels"][level])))
                for level in levels
            ]
            rows.append([f"{name} - hard labels", *map(_gap, gaps)])
    return rows


def _gap(gap: Difference | None) -> str:
    if gap is None:
        return "-"
    return f"{gap.mean:+.2f}" + ("" if gap.half is None else f" ± {gap.half:.2f}")


def _alike(seeds: list[dict[str, Any]]) -> list[list[str]]:
    stages = seeds[0]["found"]["alike"]
    pairs = list(next(iter(stages.values())))
    return [
        [pair.replace(" | ", ", "), *(_spread([s["found"]["alike"][stage][pair] for s in seeds]) for stage in stages)]
        for pair in pairs
    ]


def _spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def main() -> None:
    """Train what has no record, then write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--page-only", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.page_only:
        record(args.out, args.seeds, args.epochs)
    (args.out / "README.md").write_text(page(args.out), encoding="utf-8")
    print(args.out / "README.md")


if __name__ == "__main__":
    main()
