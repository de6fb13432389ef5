"""Check the distillation losses of other libraries, each in its own environment; one record per library.

Usage: ``python benchmarks/conformance/run.py [LIBRARY ...] [--environments DIR] [--results DIR] [--again]``.

An environment holds the pinned packages of a library, installed without their dependencies, on top of the packages of
the Python that runs this (torch on the CPU among them). A library whose record was made by the same files is skipped,
so that a stopped run goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import peers  # noqa: E402

from tempering.conformance import Status, check  # noqa: E402
from tempering.utils.files import write_atomic  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "conformance"
ENVIRONMENTS = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tempering" / "conformance"
PEERS = Path(__file__).parent / "peers"


def digest(name: str, folder: Path) -> str:
    """Identify what a record is made from: the library's file, this folder's code and the invariants."""
    files = [folder / f"{name}.py", *sorted((ROOT / "tempering" / "conformance").rglob("*.py"))]
    files += [Path(__file__), PEERS / "__init__.py"]
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()[:16]


def environment(library: peers.Library, folder: Path) -> Path:
    """Make the library's environment, if it is not there yet, and return its Python."""
    if not library.package:
        return Path(sys.executable)
    key = hashlib.sha256(repr(library.requirements).encode()).hexdigest()[:8]
    place = folder / f"{library.package}-{library.version}-{key}"
    python = place / "bin" / "python"
    if (place / "ready").is_file():
        return python
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--clear", place], check=True)
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    ).stdout.strip()
    below = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    (Path(site) / "below.pth").write_text("\n".join(below))
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
    subprocess.run([*install, *library.requirements], check=True)
    (place / "ready").touch()
    return python


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Check every loss of a library, in this process."""
    library = peers.load(name, folder)
    peers.replace_absent(library.absent)
    started, losses = time.perf_counter(), []
    for loss in library.losses:
        head = {"path": loss.path, "documented": loss.documented}
        try:
            made = loss.make()
        except Exception as error:
            losses.append(head | {"kind": loss.kind, "not loaded": f"{type(error).__name__}: {error}"[:300]})
            continue
        report = check(made, kind=loss.kind, promises=loss.promises, name=loss.path, measure=False)
        for result in report.results:
            if result.status is Status.FAIL and not loss.promises_invariant(result.name, result.message):
                result.status = Status.NOT_PROMISED
        # the smallest counterexample is a few numbers
        tensors = {r.name: {n: x.tolist() for n, x in r.tensors.items() if x.numel() <= 64} for r in report.failures}
        record = report.record() | {"counterexamples": tensors}
        record = {k: v for k, v in record.items() if k not in ("name", "format", "seconds")}
        for result in record["results"]:
            result.pop("counterexample", None)
        losses.append(head | record)
        print(report.summary(), file=sys.stderr, flush=True)
    return {
        "format": 1,
        "library": library.package or name,
        "version": library.version,
        "dated": library.dated,
        "made from": digest(name, folder),
        "seconds": round(time.perf_counter() - started, 1),
        "losses": losses,
    }


def run(name: str, folder: Path, environments: Path, results: Path, *, again: bool = False) -> Path:
    """Write the record of a library, unless it is there; return its path."""
    path = results / f"{name}.json"
    if not again and path.is_file() and json.loads(path.read_text())["made from"] == digest(name, folder):
        return path
    python = environment(peers.load(name, folder), environments)
    command = [python, __file__, "--inside", name, "--peers", folder]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "KERAS_BACKEND": "torch"}
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"checking {name} in {python} ended with code {done.returncode}.")
    results.mkdir(parents=True, exist_ok=True)
    # a peer may print while it is imported: the record is the last line
    record = json.loads(done.stdout.strip().splitlines()[-1])
    write_atomic(path, (json.dumps(record, indent=1) + "\n").encode())
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("library", nargs="*", help="default: all")
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS, help="default: %(default)s")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--peers", type=Path, default=PEERS, help="folder of the files that name the losses")
    parser.add_argument("--again", action="store_true", help="check libraries again that have a record")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        print(json.dumps(measure(given.inside, given.peers)))
        return 0
    failed: list[str] = []
    for name in given.library or peers.names(given.peers):
        try:
            run(name, given.peers, given.environments, given.results, again=given.again)
        except (RuntimeError, subprocess.CalledProcessError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed.append(name)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
