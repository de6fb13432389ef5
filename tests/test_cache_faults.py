"""Flipped bits, cut and deleted files, in half-done and finished recordings: harmless or named, never silent."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tempering.teachers import (
    Cached,
    CachedHidden,
    CachedSampled,
    CachedTopK,
    Live,
    TopKTeacher,
    record,
    record_hidden,
    record_sampled,
    record_top_k,
)
from tests import test_teachers as images
from tests.test_cache_files import TASK, TEXTS, text_teacher
from tests.test_hidden import data

DAMAGES = int(os.environ.get("TEMPERING_DAMAGES", "12"))  # of each kind and state; 500 by hand


class Stopped(Exception):
    pass


class Interrupted(Live):
    """Stops a recording after some calls."""

    calls = 10**9

    def __call__(self, inputs: Any, ids: Any = None) -> Any:
        self.calls -= 1
        if self.calls < 0:
            raise Stopped
        return super().__call__(inputs, ids)


class Kind(NamedTuple):
    """How a kind of cache is recorded from a live teacher, opened, and read as a whole."""

    live: Callable[[], Live]
    record: Callable[[Live, Path], Any]
    open: Callable[[Path], Any]
    read: Callable[[Any], tuple[torch.Tensor, ...]]
    calls: int  # after which it is half done


def images_read(cached: Any) -> tuple[torch.Tensor, ...]:
    return (cached(torch.zeros(1), torch.arange(cached.rows)),)


def texts_read(cached: Any) -> tuple[torch.Tensor, ...]:
    output = cached(TASK.inputs(data().batch(range(5)))[1], None)
    fields = (output.states, output.head.weight) if hasattr(output, "states") else (output.ids, output.logp)
    return (*fields, output.stored, *((output.tail_logp,) if hasattr(output, "tail_logp") else ()))


def of_images(source: Live, path: Path) -> Any:
    return record(source, images.data(), path, quiet=True)


def likeliest(source: Live, path: Path) -> Any:
    return record_top_k(TopKTeacher(source, top=3), data(), path, **TEXTS)


def sampled(source: Live, path: Path) -> Any:
    return record_sampled(TopKTeacher(source, samples=4), data(), path, **TEXTS)


def hidden(source: Live, path: Path) -> Any:
    return record_hidden(source, data(), path, **TEXTS)


KINDS = {
    "logits": Kind(lambda: Live(images.net()), of_images, Cached, images_read, 2),
    "likeliest": Kind(text_teacher, likeliest, CachedTopK, texts_read, 2),
    "sampled": Kind(text_teacher, sampled, CachedSampled, texts_read, 2),
    "hidden": Kind(text_teacher, hidden, CachedHidden, texts_read, 2),
}


def damage(path: Path, draw: random.Random) -> str:
    """Flip bits of a file, cut it, or delete it; return what was done."""
    content = bytearray(path.read_bytes())
    how = draw.choice(("flip", "flip", "cut", "delete"))
    if how == "delete":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[: draw.randrange(len(content))])
    else:
        for _ in range(draw.choice((1, 1, 3))):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
    return f"{how} {path.name}"


def same(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b, strict=True))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempering.teachers.cache.recorder.EVERY", 0.0)
    monkeypatch.setattr("tempering.teachers.cache.shard_recorder.TEXTS", 2)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.mark.parametrize("state", ["half", "finished"])
@pytest.mark.parametrize("name", KINDS)
def test_damage_is_harmless_or_named(name: str, state: str, tmp_path: Path) -> None:
    kind, whole = KINDS[name], tmp_path / "whole"
    source = kind.live()
    want = kind.read(kind.record(source, whole))
    origin = whole
    if state == "half":
        stopped = Interrupted(source.model)
        stopped.calls, origin = kind.calls, tmp_path / "half.partial"
        with pytest.raises(Stopped):
            kind.record(stopped, tmp_path / "half")
        assert len(list(origin.iterdir())) >= 3
    named, draw = 0, random.Random(f"{name} {state}")
    for number in range(DAMAGES):
        path = tmp_path / f"c{number}"
        folder = path if state == "finished" else path.with_name(path.name + ".partial")
        shutil.copytree(origin, folder)
        done = damage(draw.choice(sorted(folder.iterdir())), draw)
        file = done.split()[1]
        ways = [partial(kind.record, source)] if state == "half" else [kind.open, partial(kind.record, source)]
        for way in ways:
            try:
                got = kind.read(way(path))
            except (RuntimeError, ValueError, OSError) as error:
                assert file in str(error), f"{done}: {type(error).__name__} does not name it: {error}"
                assert str(tmp_path) in str(error) and any(word in str(error) for word in ("emove", "Make one")), str(
                    error
                )
                named += 1
            else:
                assert same(got, want), f"{done}: other numbers, in silence"
        for left in (folder, path):
            shutil.rmtree(left, ignore_errors=True)
    assert named > DAMAGES // 4, "most damage of what is kept is noticed"


@pytest.mark.parametrize("name", KINDS)
def test_a_bit_that_flips_in_a_half_done_recording_is_not_sealed(name: str, tmp_path: Path) -> None:
    kind, path = KINDS[name], tmp_path / "c"
    stopped = Interrupted(kind.live().model)
    stopped.calls = kind.calls
    with pytest.raises(Stopped):
        kind.record(stopped, path)
    file = next(iter(sorted(path.with_name("c.partial").glob("[0l]*.*"))))
    content = bytearray(file.read_bytes())
    content[-3] ^= 4  # of the numbers, not of a header
    file.write_bytes(content)
    with pytest.raises(RuntimeError, match=rf"{file.name} .*changed since it was .*Remove"):
        kind.record(kind.live(), path)
    assert not path.exists()


@pytest.mark.parametrize("name", ["logits", "hidden"])
def test_a_folder_in_place_of_a_file_is_named(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    stopped = Interrupted(kind.live().model)
    stopped.calls = kind.calls
    with pytest.raises(Stopped):
        kind.record(stopped, tmp_path / "half")
    for file in sorted((tmp_path / "half.partial").iterdir()):
        path = tmp_path / file.stem
        shutil.copytree(file.parent, folder := path.with_name(path.name + ".partial"))
        (folder / file.name).unlink()
        (folder / file.name).mkdir()
        with pytest.raises(OSError, match=rf"{file.name} is a folder, and must be a file. Remove it"):
            kind.record(kind.live(), path)
