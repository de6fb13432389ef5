"""Files are replaced whole or not at all, locks hold between processes, and nests of tensors keep their classes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
import threading
from collections import OrderedDict, defaultdict
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import filelock
import pytest
import torch
from torch import Tensor

from tempering.utils import files
from tempering.utils.files import LockedError, LockUnsupportedError, file_lock, is_locked, try_lock, write_atomic
from tempering.utils.tensors import map_tensors, to_device
from tests.paths import ROOT

fcntl = pytest.importorskip("fcntl", reason="file systems without locks are imitated by replacing flock")


# writing


def test_a_file_is_written_as_it_is_given(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for content in ("größer\n\r\n", b"\x00\xff\r\n"):
        for how in ({}, {"fsync": True}, {"concurrent": True}):
            write_atomic(path, content, **how)
            assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("fsync", [False, True])
def test_a_write_that_fails_leaves_the_older_file_and_nothing_else(
    fsync: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    write_atomic(path, "old")

    def full(path: Path, data: bytes, *, fsync: bool) -> None:
        path.write_bytes(data[:1])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new", fsync=fsync)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_writers_of_one_file_do_not_share_a_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(files, "write_file", lambda path, data, fsync: (seen.append(path.name), path.touch()))
    for number in (1, 2):
        monkeypatch.setattr(os, "getpid", lambda number=number: number)
        write_atomic(tmp_path / "a", "", concurrent=True)
    assert seen == ["a.1.partial", "a.2.partial"]


# locks


def test_a_lock_is_held_once_and_given_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "lock"
    assert not is_locked(path) and not path.parent.exists(), "a look creates nothing"
    with file_lock(path):
        assert is_locked(path) and try_lock(path) is None
        ways: list[dict[str, Any]] = [{"blocking": False}, {"timeout": 0.05}]
        for how in ways:
            with pytest.raises(LockedError, match=r"another process holds the lock.*lock"), file_lock(path, **how):
                raise AssertionError("held twice")
    assert not is_locked(path)
    lock = try_lock(path)
    assert lock is not None and is_locked(path)
    lock.release()
    assert not is_locked(path)


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    lock = try_lock(tmp_path / "lock")
    assert lock is not None
    waiting = threading.Timer(0.2, lock.release)
    waiting.start()
    with file_lock(tmp_path / "lock", timeout=60):
        assert not lock.is_locked
    waiting.join()


def test_a_look_needs_no_right_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``tempering compare --status`` of another user's folder."""
    path = tmp_path / "lock"
    lock = try_lock(path)
    assert lock is not None
    monkeypatch.setattr(files, "try_lock", None)
    assert is_locked(path)
    lock.release()
    assert not is_locked(path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
@pytest.mark.parametrize("older", [False, True], ids=["filelock 4", "filelock 3"])
def test_a_file_system_without_locks_is_named(
    number: int, older: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock"

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    def acquire(self: Any, timeout: float) -> None:
        assert timeout == 0, "it would wait forever"
        path.touch()
        raise filelock.Timeout(str(path))  # filelock 3 takes every error for another process's lock

    monkeypatch.setattr(fcntl, "flock", flock)
    if older:
        monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    said = f"cannot lock {path}: its file system has no file locks .* Write to a folder on a local disk"
    with pytest.raises(LockUnsupportedError, match=said) as caught, file_lock(path):
        raise AssertionError("held")
    assert caught.value.errno == number and isinstance(caught.value, OSError)
    with pytest.raises(LockUnsupportedError, match=said):
        try_lock(path)
    with pytest.raises(LockUnsupportedError, match=said):
        is_locked(path)


WITHOUT_FCNTL = """
    import sys, warnings
    from pathlib import Path

    sys.modules["fcntl"] = None
    warnings.filterwarnings("ignore", "only soft file lock is available")
    import torch
    import tempering.experiments.compare.runner, tempering.experiments.tune.runner, tempering.teachers
    from tempering.data import Batches
    from tempering.experiments.compare.status import is_running
    from tempering.teachers import Live, record
    from tempering.utils.files import LockedError, file_lock, inheritable_descriptors, is_locked, try_lock

    out = Path(sys.argv[1])
    batches = Batches(torch.zeros(4, 3, 2, 2, dtype=torch.uint8), torch.zeros(4).long(), batch_size=2, mean=(0.5,) * 3,
                      std=(0.2,) * 3)
    teacher = Live(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)))
    for _ in range(2):
        assert record(teacher, batches, out / "cache", quiet=True).rows == 4
    assert [p.name for p in out.iterdir()] == ["cache"], list(out.iterdir())

    lock = try_lock(out / "cell.lock")
    assert inheritable_descriptors(lock) == () and is_running(out / "cell") and try_lock(out / "cell.lock") is None
    lock.release()
    assert not is_running(out / "cell")
    with file_lock(out / "lock"):
        assert is_locked(out / "lock")
    assert "fcntl" not in {name for name, module in sys.modules.items() if module is not None}
    print("ok")
"""


def test_everything_works_without_fcntl(tmp_path: Path) -> None:
    """As on Windows, which has other locks; here the place of those is taken by filelock's soft ones."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(WITHOUT_FCNTL), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "ok\n", done.stderr


# nests of tensors


class Pair(NamedTuple):
    first: Tensor
    second: Any


class Frozen(dict):
    """A dict of its own class, with an attribute."""

    note = "kept"


def test_every_tensor_is_changed_and_every_class_is_kept() -> None:
    x = torch.ones(2)
    nest = {
        "tensor": x,
        "named": Pair(x, [x, (x, "text")]),
        "ordered": OrderedDict(b=x, a=None),
        "default": defaultdict(list, a=x),
        "proxy": MappingProxyType({"a": x}),
        "own": Frozen(a=x),
        "size": torch.Size([2, 3]),
        "other": {1, 2},
    }
    out = map_tensors(nest, lambda t: t + 1)
    assert [type(v) for v in out.values()][1:4] == [Pair, OrderedDict, defaultdict]
    assert type(out["own"]) is Frozen and type(out["size"]) is torch.Size and isinstance(out["named"], Pair)
    assert list(out["ordered"]) == ["b", "a"] and out["default"]["missing"] == [] and out["other"] == {1, 2}
    assert out["named"].second[1][1] == "text" and type(out["named"].second[1]) is tuple
    for t in (
        *(out["tensor"], out["named"].first, out["named"].second[0], out["named"].second[1][0]),
        *(out["ordered"]["b"], out["default"]["a"], out["proxy"]["a"], out["own"]["a"]),
    ):
        assert torch.equal(t, torch.full((2,), 2.0))
    assert torch.equal(x, torch.ones(2)) and nest["own"]["a"] is x and nest["ordered"]["b"] is x
    assert "missing" not in nest["default"]


def test_mappings_of_transformers_keep_their_attributes() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_outputs import CausalLMOutput

    output: Any = CausalLMOutput(logits=torch.ones(1), hidden_states=(torch.ones(2), torch.ones(3)))  # pyright: ignore
    batch = transformers.BatchEncoding({"input_ids": torch.ones(1, 2).long(), "text": ["a"]})
    for moved in (to_device([output, batch], "meta"), to_device([output, batch], torch.device("meta"))):
        assert type(moved[0]) is CausalLMOutput and type(moved[1]) is transformers.BatchEncoding
        assert moved[0].logits.device.type == moved[0]["logits"].device.type == "meta"
        assert [x.device.type for x in moved[0].hidden_states] == ["meta", "meta"]
        assert moved[1].input_ids.device.type == "meta" and moved[1]["text"] == ["a"]
    assert output.logits.device.type == batch["input_ids"].device.type == "cpu"


def test_copies_to_cuda_go_through_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a device: the calls that a batch makes; a copy from memory that is not pinned makes the host wait."""
    calls: list[tuple[str, Any]] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda x: calls.append(("pin", len(x))) or x)
    monkeypatch.setattr(Tensor, "to", lambda x, device, **kw: calls.append((str(device), kw)) or x)
    to_device({"x": torch.zeros(3), "y": [torch.zeros(2)]}, "cuda:1")
    copy = ("cuda:1", {"non_blocking": True})
    assert calls == [("pin", 3), copy, ("pin", 2), copy]
    calls.clear()
    to_device(torch.zeros(3), "cpu")
    assert calls == [("cpu", {"non_blocking": False})]
