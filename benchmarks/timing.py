"""What the benchmarks share: variants timed in turn, peaks in processes of their own, and the CSV they write."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "speed"
FIELDS = ("case", "arm", "ms", "speed", "low", "high", "peak", "unit", "rounds", "note")
FACTS = ("host", "device", "threads", "torch", "python", "commit")
Variant = Callable[[], object]


def arguments(doc: str | None, *, rounds: int, **numbers: int) -> argparse.ArgumentParser:
    """The flags that every benchmark has, and ``numbers``, a whole number each, with their defaults."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes: shows that it runs, times nothing")
    parser.add_argument("--rounds", type=int, default=rounds, help="times that every variant is run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV")
    parser.add_argument("--peak", default=None, help=argparse.SUPPRESS)  # CASE|ARM: what peak_of() asks for
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser


def device() -> torch.device:
    """CUDA where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def now() -> float:
    """CPU seconds of this process on a CPU, seconds of the clock where a device is waited for."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def seconds(variant: Variant) -> float:
    """Seconds of one call."""
    begun = now()
    variant()
    return now() - begun


def in_turn(
    variants: Mapping[str, Any], *, rounds: int, warm: int = 1, measure: Callable[[Any], float] = seconds
) -> dict[str, list[float]]:
    """Seconds of every variant in every round; a round runs each once, so that a busy machine slows all alike."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(warm + rounds):
        for name, variant in variants.items():
            took = measure(variant)
            if round_ >= warm:
                taken[name].append(took)
    return taken


class Marks:
    """The seconds between the end of a leg's first step, which warms up, and that of its last."""

    def __init__(self, steps: int) -> None:
        self.steps, self.at = steps, dict[int, float]()

    def __call__(self, step: int, *_: object) -> None:
        if step in (0, self.steps):
            self.at[step] = now()

    @property
    def seconds(self) -> float:
        return self.at[self.steps] - self.at[0]


def legs_in_turn(legs: Mapping[str, Any], *, steps: int, rounds: int, warm: int = 1) -> dict[str, list[float]]:
    """What every leg returns in every round, its seconds for so many steps."""
    return in_turn(legs, rounds=rounds, warm=warm, measure=lambda leg: leg(steps))


def peak_of(script: str, what: str, *, tiny: bool, threads: int) -> float:
    """What ``script --peak WHAT`` prints: bytes at most beside what was there before."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--peak", what, "--threads", str(threads)]
    done = subprocess.run([*command, *(["--tiny"] if tiny else [])], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return float(done.stdout.splitlines()[-1])


def peaks_of(script: str, case: str, names: Iterable[str], *, args: argparse.Namespace, one: float) -> dict[str, float]:
    """The peak of every named variant in a case, in units of ``one`` bytes."""
    peaks = {name: peak_of(script, f"{case}|{name}", tiny=args.tiny, threads=args.threads) for name in names}
    return {name: peak / one for name, peak in peaks.items()}


def grown(variant: Variant, small: Variant) -> float:
    """Bytes by which the process, or the device's allocator, grows at most in ``variant``; ``small`` runs before."""
    small()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        variant()
        return float(torch.cuda.max_memory_allocated() - before)
    try:  # Linux: the high-water mark set back to what is held now, so that nothing earlier hides what it takes
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        variant()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024.0
    before = _held("VmRSS")
    variant()
    return _held("VmHWM") - before


def _held(name: str) -> float:
    """Bytes of this process, as Linux counts them."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{name}:"))
    return float(line.split()[1]) * 1024.0


def installed(name: str) -> bool:
    """Whether a peer is here."""
    return importlib.util.find_spec(name) is not None


class Sheet:
    """The lines of one benchmark, shown as they come and written as CSV at the end."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name, self.args = name, args
        self.lines: list[dict[str, object]] = []
        torch.set_num_threads(args.threads)

    def add(
        self,
        case: str,
        taken: Mapping[str, Sequence[float]],
        *,
        notes: Mapping[str, str] | None = None,
        peaks: Mapping[str, float] | None = None,
        per: int = 1,
        unit: str = "",
    ) -> None:
        """A line a variant: median milliseconds of one of ``per``, and how many times as fast as the first variant.

        ``low`` and ``high`` are the quartiles of that ratio over the rounds.
        """
        first = taken[next(iter(taken))]
        for variant, values in taken.items():
            ratios = sorted(a / max(b, 1e-9) for a, b in zip(first, values, strict=True))
            line = {
                "case": case,
                "arm": variant,
                "ms": f"{1e3 * statistics.median(values) / per:.4g}",
                "speed": f"{statistics.median(ratios):.4g}",
                "low": f"{ratios[len(ratios) // 4]:.4g}",
                "high": f"{ratios[-1 - len(ratios) // 4]:.4g}",
                "peak": "" if peaks is None or variant not in peaks else f"{peaks[variant]:.3g}",
                "unit": unit,
                "rounds": len(values),
                "note": (notes or {}).get(variant, ""),
            }
            self.lines.append(line)
            print(f"{case:34s} {variant:44s} {line['ms']:>9} ms {line['speed']:>7} x  {line['peak']:>6}", flush=True)

    def keep(self, cases: Container[str]) -> None:
        """Keep what the CSV has of cases beside these."""
        path = self.args.out / f"{self.name}.csv"
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                self.lines.extend({**line} for line in csv.DictReader(file) if line["case"] not in cases)

    def write(self) -> Path:
        """The CSV, with the facts of the machine on every line."""
        facts = machine(self.args.threads)
        self.args.out.mkdir(parents=True, exist_ok=True)
        path = self.args.out / f"{self.name}.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, (*FIELDS, *FACTS), lineterminator="\n")
            writer.writeheader()
            writer.writerows({**facts, **line} for line in self.lines)
        return path


def machine(threads: int) -> dict[str, object]:
    """What a number depends on beside the code: host, device, threads, versions, commit."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        named = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
        cpu = named[0].split(":", 1)[1].strip() if named else cpu
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True, cwd=ROOT, check=False).stdout.strip()
    return {
        "host": f"{platform.system()} {platform.machine()}, {cpu}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or "unknown",
    }
