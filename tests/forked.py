"""Run pieces of code, each in a fork of one fresh interpreter, which has imported the slow packages once.

``python -m tests.forked`` reads ``{"preload": [module, ...], "parts": {name: {"code": ..., "cwd": ...}}}`` from stdin
and writes ``{name: [exit code, stdout, stderr]}`` to stdout.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.paths import ROOT


def run_parts(
    parts: Mapping[str, str], preload: Sequence[str] = (), *, cwd: Mapping[str, Path] | None = None, **env: str
) -> dict[str, tuple[int, str, str]]:
    """What each piece of code exits with, prints and complains of; ``cwd``: folders to run in, by name."""
    folders = cwd or {}
    asked = {name: {"code": code, "cwd": str(folders.get(name, ROOT))} for name, code in parts.items()}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.forked"],
        input=json.dumps({"preload": list(preload), "parts": asked}),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
        timeout=600,
        check=False,
    )
    assert not done.returncode, done.stderr[-3000:]
    return {name: (code, out, err) for name, (code, out, err) in json.loads(done.stdout).items()}


def _one(code: str, cwd: str) -> tuple[int, str, str]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os.chdir(cwd)
            status = 0
            try:
                exec(compile(code, "<part>", "exec"), {"__name__": "__main__"})
            except BaseException:
                traceback.print_exc()
                status = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for file in (out, err):
            file.seek(0)
        return status, out.read().decode(), err.read().decode()


def main() -> None:
    asked: dict[str, Any] = json.load(sys.stdin)
    for name in asked["preload"]:
        with contextlib.suppress(ImportError):  # an optional package
            importlib.import_module(name)
    json.dump({name: _one(**part) for name, part in asked["parts"].items()}, sys.stdout)


if __name__ == "__main__":
    main()
