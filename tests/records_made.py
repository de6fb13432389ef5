"""Made-up records, for the report's tests and to look at a page: plausible, small, the same every time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

RECORDED = {
    "student alone": {"method": {"name": "Supervised"}, "end": 0.928, "agreement": None},
    "KD": {
        "method": {"name": "KD", "soft": 0.9, "hard": 0.1, "temperature": {"name": "Static", "tau": 4.0}},
        "end": 0.939,
    },
    "KD, weight-matched": {
        "method": {"name": "KD", "soft": 4.0, "hard": 1.0, "temperature": {"name": "Static", "tau": 4.0}},
        "end": 0.946,
    },
    "DTKD published": {
        "method": {
            "name": "DTKD",
            "dynamic": 3.0,
            "temperature": {"name": "Sharpness", "tau": 4.0, "solve": "published"},
        },
        "end": 0.945,
    },
    "DTKD exact": {
        "method": {"name": "DTKD", "dynamic": 3.0, "temperature": {"name": "Sharpness", "tau": 4.0, "solve": "exact"}},
        "end": 0.951,
    },
}
TEACHER = 0.978


def make_set(root: Path, *, seeds: int = 3, classes: int = 10, epochs: int = 20) -> list[Path]:
    """Five methods of ``seeds`` runs each under ``root``; their folders."""
    return [
        make_run(root / f"{i}-{seed}", label, seed, order=i, classes=classes, epochs=epochs)
        for i, label in enumerate(RECORDED)
        for seed in range(seeds)
    ]


def make_run(
    folder: Path,
    label: str,
    seed: int,
    *,
    like: str | None = None,
    order: int = 0,
    end: float | None = None,
    classes: int = 10,
    epochs: int = 20,
    status: str = "done",
    **facts: Any,
) -> Path:
    """One run's folder; ``like`` names the entry of RECORDED it is made after, where the label is another."""
    spec = RECORDED[like or label]
    rng = np.random.default_rng([seed, order, classes])
    end = (
        spec["end"] + 0.004 * float(np.random.default_rng(seed).normal()) + 0.002 * float(rng.normal())
        if end is None
        else end
    )
    folder.mkdir(parents=True, exist_ok=True)
    taught = spec["method"]["name"] != "Supervised"
    last = epochs if status == "done" else epochs // 2
    lines = [_epoch(e, epochs, end, taught, rng) for e in range(1, last + 1)]
    scores = {"epoch": last, "validation": lines[-1]["validation"], "test": lines[-1]["test"]}
    best = max(lines, key=lambda line: line["validation"]["accuracy"])
    made = {
        "format": 1,
        "status": status,
        "command": [
            "tempering",
            "run",
            "recipes/digits.py",
            f"--method={spec['method']['name'].lower()}",
            f"--seed={seed}",
        ],
        "started": f"2026-03-01T10:{order:02d}:{seed:02d}+00:00",
        "finished": f"2026-03-01T11:{order:02d}:{seed:02d}+00:00" if status == "done" else None,
        "host": {"name": "bench-1", "cpu": "Example CPU 3000", "cores": 2, "gpu": None, "platform": "Linux-6.1-x86_64"},
        "versions": {"python": "3.11.9", "tempering": "0.1.0", "torch": "2.13.0", "numpy": "2.3.1"},
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "dirty": False,
        "seed": seed,
        "method": spec["method"],
        "label": label,
        "student": {"name": "small", "parameters": 6_218},
        "teacher": {"name": "large", "parameters": 152_330, "identity": "5f" * 32, "scores": {}} if taught else None,
        "data": {
            "name": "digits",
            "train": 1078,
            "validation": 359,
            "test": 360,
            "classes": classes,
            "identity": "ab" * 32,
        },
        "settings": {"epochs": epochs, "seed": seed, "precision": "32-true", "accumulate": 1},
        "optimizer": [{"lr": 0.05, "momentum": 0.9, "weight_decay": 0.0005}],
        "selfcheck": {
            "line": "self-check ok: frozen, eval, classes, agreement, split, shift, weight 0, gradients",
            "checks": {},
        },
        "best_by": "validation/accuracy",
        "result": None,
        **facts,
    }
    if status == "done":
        chosen = {key: best[key] for key in ("epoch", "validation", "test")}
        step_ms = 3.1 + 1.4 * taught + 0.9 * ("DTKD" in label) + 0.05 * float(rng.normal())
        made["result"] = {
            "last": scores,
            "best": chosen,
            "step_ms": step_ms,
            "peak_mb": 410.0 + 30 * taught,
            "seconds": 41.5,
        }
        analysis = _analysis(end, taught, classes, spec, rng)
        (folder / "analysis.json").write_text(json.dumps(analysis))
    (folder / "facts.json").write_text(json.dumps(made))
    (folder / "epochs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps = [_step(s, 17 * epochs, spec, rng) for s in range(5, 17 * last + 1, 5)]
    (folder / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    return folder


def _epoch(epoch: int, epochs: int, end: float, taught: bool, rng: np.random.Generator) -> dict[str, Any]:
    share = epoch / epochs
    accuracy = end - 0.55 * np.exp(-6 * share) + 0.006 * (1 - share) * rng.normal()
    accuracy = end if epoch == epochs else float(min(accuracy, 0.999))

    def scores(shift: float) -> dict[str, float]:
        out = {
            "accuracy": accuracy + shift,
            "top5": 1 - 0.3 * (1 - accuracy),
            "loss": 2.6 * (1 - accuracy),
            "ece": 0.02,
        }
        return out | ({"agreement": accuracy + 0.012} if taught else {})

    line = {
        "epoch": epoch,
        "step": 17 * epoch,
        "seconds": 2.0 * epoch,
        "loss": (8.0 if taught else 2.3) * float(np.exp(-3 * share + 0.05 * rng.normal())),
        "lr": 0.05,
    }
    return {**line, "validation": scores(-0.003 + 0.004 * float(rng.normal())), "test": scores(0.0)}


def _step(step: int, steps: int, spec: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    share, method = step / steps, spec["method"]
    noise = float(np.exp(0.12 * rng.normal()))
    terms = {"hard": (2.3 * float(np.exp(-4 * share)) + 0.08) * noise}
    line: dict[str, Any] = {"step": step, "epoch": 1 + (step - 1) // 17, "progress": share, "lr": 0.05 * (1 - share)}
    line |= {"rows_per_second": 64 / 0.0045, "step_ms": 4.5}
    if method["name"] != "Supervised":
        ramp = min(1.0, 12 * share)
        terms["soft"] = ramp * (6.0 * float(np.exp(-3 * share)) + 0.5) * noise
        delta, fell, gap = 0.0, 0, 1.6 * float(np.exp(-1.5 * share)) * noise + 0.2
        if method["name"] == "DTKD":
            terms["dynamic"] = ramp * (9.0 * float(np.exp(-3.5 * share)) + 0.6) * noise
            delta = 2.1 * float(np.exp(-2.2 * share)) + 0.25 + 0.04 * float(rng.normal())
            if method["temperature"]["solve"] == "published":
                fell, gap = int(rng.poisson(6 * np.exp(-5 * share))), 0.25 * gap
            else:
                gap = 1e-6 * noise
            line["policy"] = {"fallback": fell, "clamped": 0}
        width = 0.45 * delta
        line["T_teacher"] = {"mean": 4 + delta, "p5": 4 + delta - width, "p95": 4 + delta + width}
        line["T_student"] = {"mean": 4 - delta, "p5": 4 - delta - width, "p95": 4 - delta + width}
        line["logsumexp_gap"] = gap
    return {**line, "loss": sum(terms.values()), "terms": terms}


def _analysis(end: float, taught: bool, classes: int, spec: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    sides = {"student": (end, 0.03), "teacher": (TEACHER, 0.01)} if taught else {"student": (end, 0.05)}
    out: dict[str, Any] = {
        "split": "test",
        "classes": classes,
        "class_names": None,
        "agreement": end + 0.012 if taught else None,
    }
    out["accuracy"] = {side: accuracy for side, (accuracy, _) in sides.items()}
    out["ece"] = {side: gap for side, (_, gap) in sides.items()}
    out["reliability"] = {side: _bins(gap, rng) for side, (_, gap) in sides.items()}
    hard = np.random.default_rng(classes).normal(size=classes)
    out["per_class"] = {
        side: np.clip(accuracy + (1 - accuracy) * (hard + 0.4 * rng.normal(size=classes)), 0, 1).round(4).tolist()
        for side, (accuracy, _) in sides.items()
    }
    pairs = [(k, (k + 1 + k % 3) % classes) for k in range(min(classes, 14))]
    out["confusions"] = [
        {"true": t, "predicted": p, "student": int(rng.poisson(4 if t % 2 else 2)), "teacher": int(rng.poisson(1))}
        for t, p in pairs
        if taught
    ]
    out["temperatures"] = None
    if spec["method"]["name"] == "DTKD":
        bins = [
            {"bin": i, "count": 72, "T_teacher": 4.1 + 0.35 * i, "T_student": 3.9 - 0.35 * i, "teacher_margin": 2.0 * i}
            for i in range(5)
        ]
        out["temperatures"] = {"by_difficulty": bins}
    return out


def _bins(gap: float, rng: np.random.Generator) -> list[dict[str, float]]:
    bins = []
    for i in range(15):
        count = int(260 * np.exp(-0.9 * (14 - i))) + int(rng.integers(0, 5)) if i > 3 else 0
        confidence = (i + 0.5) / 15
        accuracy = (
            float(np.clip(confidence - 3 * gap * (1 - confidence) * 2 + 0.03 * rng.normal(), 0, 1)) if count else 0.0
        )
        bins.append(
            {
                "low": i / 15,
                "high": (i + 1) / 15,
                "count": count,
                "confidence": confidence if count else 0.0,
                "accuracy": accuracy,
            }
        )
    return bins


if __name__ == "__main__":
    for made in make_set(Path(sys.argv[1]), classes=int(sys.argv[2]) if len(sys.argv) > 2 else 10):
        print(made)
