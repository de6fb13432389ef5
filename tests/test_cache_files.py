"""Recordings on disk: those of earlier versions stay readable, and a full disk leaves no half of a file."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tempering.tasks import LanguageModeling
from tempering.teachers import (
    Cached,
    CachedHidden,
    CachedSampled,
    CachedTopK,
    Live,
    Teacher,
    TopKTeacher,
    record,
    record_hidden,
    record_sampled,
    record_top_k,
)
from tempering.teachers.cache.base import CachedTeacher, CorruptCacheError
from tests import test_teachers as images
from tests.test_generation import gpt2
from tests.test_hidden import data

KEY = {"format": 1, "data": "d" * 64, "teacher": "t" * 64, "augmentation": {"views": None}}
MADE = {"teacher": "GPT2LMHeadModel", "device": "cpu", "torch": "2.6.0", "tempering": "0.1.0"}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_logits(folder: Path) -> torch.Tensor:
    """A table of logits as version 0.1 wrote it."""
    folder.mkdir()
    table = np.arange(6, dtype="<f2").reshape(3, 2)
    np.save(folder / "logits.npy", table)
    size = (folder / "logits.npy").stat().st_size
    own = {"precision": "fp16", "rows": 3, "classes": 2, "bytes": size, "sha256": sha256(folder / "logits.npy")}
    (folder / "key.json").write_text(json.dumps({**KEY, **own, "made": MADE}, indent=1))
    return torch.from_numpy(table.astype("f4"))


def write_shards(folder: Path, kind: str, shards: dict[str, Any], **own: Any) -> None:
    """A recording of texts as version 0.1 wrote it, with the lock file that it left."""
    folder.mkdir()
    held = []
    for name, (tensors, about) in shards.items():
        save_file(tensors, folder / name, metadata=about)
        held.append({"file": name, "bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)})
    whole = hashlib.sha256("".join(s["sha256"] for s in held).encode()).hexdigest()
    key = {**KEY, "kind": kind, "rows": 3, "length": 2, **own, "size": 2, "shards": held, "sha256": whole, "made": MADE}
    (folder / "key.json").write_text(json.dumps(key, indent=1))
    (folder / "lock").touch()


def test_logits_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    want = write_logits(tmp_path / "c")
    cached = Cached(tmp_path / "c", checksum=True)
    assert torch.equal(cached(torch.zeros(1), torch.tensor([2, 0])), want[[2, 0]])
    key = {**KEY, "precision": "fp16", "rows": 3, "classes": 2, "bytes": cached.key["bytes"]}
    digest = json.dumps({**key, "sha256": cached.key["sha256"]}, sort_keys=True)
    assert cached.identity == hashlib.sha256(digest.encode()).hexdigest(), "checkpoints name their teacher by it"


def test_hidden_states_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    states = torch.arange(3 * 2 * 4).view(3, 2, 4).to(torch.bfloat16)
    weight = torch.arange(20.0).view(5, 4)
    parts = {"00000.safetensors": ({"states": states[:2]}, {}), "00001.safetensors": ({"states": states[2:]}, {})}
    parts["head.safetensors"] = ({"weight": weight}, {"scale": "0.5", "cap": "None"})
    write_shards(tmp_path / "c", "hidden states", parts, precision="bf16", head="h" * 64)
    found = CachedHidden(tmp_path / "c", checksum=True)({}, torch.tensor([2, 0]))
    assert torch.equal(found.states, states[[2, 0]]) and torch.equal(found.head.weight, weight)
    assert (found.head.scale, found.head.cap, found.head.bias) == (0.5, None, None)


def test_likeliest_tokens_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    ids = torch.tensor([[[7, 300], [1, 2]]] * 3) + torch.arange(3)[:, None, None]
    logp = torch.tensor([0.5, 0.25]).log().expand(3, 2, 2).contiguous()
    rest = torch.full((3, 2), 0.25).log()
    tokens = torch.stack((ids % 256, ids // 256), -1).to(torch.uint8)
    whole = {"ids": tokens, "logp": logp, "rest": rest}
    parts = {f"0000{i}.safetensors": ({n: x[2 * i : 2 * i + 2] for n, x in whole.items()}, {}) for i in range(2)}
    write_shards(tmp_path / "c", "likeliest tokens", parts, precision="fp32")
    found = CachedTopK(tmp_path / "c", checksum=True)({}, torch.tensor([2, 0]))
    assert torch.equal(found.ids, ids[[2, 0]]) and torch.equal(found.logp, logp[:2])
    assert torch.equal(found.tail_logp, rest[:2])


def test_drawn_tokens_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    """Position 0 of every text drew token 5 three times and token 9 once, position 1 token 200 four times."""
    words = torch.tensor([(5 << 3) | 3, (9 << 3) | 1, (200 << 3) | 4])

    def part(texts: int) -> dict[str, torch.Tensor]:
        held = words.repeat(texts)
        return {
            "words": torch.stack((held % 256, held // 256), -1).to(torch.uint8),
            "kinds": torch.tensor([[2, 1]] * texts, dtype=torch.uint8),
            "start": 3 * torch.arange(texts + 1),
            "bits": torch.tensor([3]),
        }

    write_shards(
        tmp_path / "c",
        "drawn tokens",
        {"00000.safetensors": (part(2), {}), "00001.safetensors": (part(1), {})},
        samples=4,
    )
    inputs = {"input_ids": torch.tensor([[1, 5]])}
    found = CachedSampled(tmp_path / "c", checksum=True)(inputs, torch.tensor([2]))
    assert found.ids.tolist() == [[[5, 9, 5], [200, 0, 5]]]
    torch.testing.assert_close(found.logp.exp(), torch.tensor([[[0.75, 0.25, 0.0], [1.0, 0.0, 0.0]]]))


def test_a_recording_of_another_kind_is_refused_by_every_class(tmp_path: Path) -> None:
    write_logits(tmp_path / "c")
    for kind in (CachedHidden, CachedTopK, CachedSampled):
        with pytest.raises(ValueError, match=f"contains logits, and {kind.__name__} reads {kind.kind}"):
            kind(tmp_path / "c")


def test_every_cache_is_one_kind_of_teacher() -> None:
    for kind in (Cached, CachedHidden, CachedTopK, CachedSampled):
        assert issubclass(kind, CachedTeacher)


# a full disk, a kill


def text_teacher() -> Live:
    model = gpt2(12, 1).float()
    TASK.prepare_model(model)
    return Live(model)


TASK = LanguageModeling()
TEXTS: dict[str, Any] = {"inputs": TASK.inputs, "quiet": True}
RECORDINGS: dict[str, Callable[[Path], Teacher]] = {
    "logits": lambda path: record(Live(images.net()), images.data(), path, quiet=True),
    "hidden": lambda path: record_hidden(text_teacher(), data(), path, **TEXTS),
    "likeliest": lambda path: record_top_k(TopKTeacher(text_teacher(), top=3), data(), path, **TEXTS),
    "drawn": lambda path: record_sampled(TopKTeacher(text_teacher(), samples=4), data(), path, **TEXTS),
}


@pytest.mark.parametrize("how", RECORDINGS)
def test_whenever_the_disk_is_full_the_recording_goes_on_later(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = RECORDINGS[how](tmp_path / "whole").identity if how != "hidden" else None
    plain = os.fsync
    for number in range(1, 20):
        path, writes = tmp_path / f"c{number}", []

        def full(descriptor: int, writes: list[int] = writes, number: int = number) -> None:
            writes.append(descriptor)
            if len(writes) == number:
                os.truncate(descriptor, 0)  # as a full disk leaves it
                raise OSError(errno.ENOSPC, "No space left on device")
            plain(descriptor)

        monkeypatch.setattr(os, "fsync", full)
        try:
            RECORDINGS[how](path)
        except OSError as error:
            assert error.errno == errno.ENOSPC and not path.exists()
            partial = path.with_name(path.name + ".partial")
            assert not list(partial.rglob("*.partial"))
            for file in partial.glob("*.json"):
                assert json.loads(file.read_text())["format"] in (1, 2), "a key is whole or not there"
        else:
            assert len(writes) == number - 1 > 2, "there were as many writes, and each failed once"
            break
        monkeypatch.setattr(os, "fsync", plain)
        again = RECORDINGS[how](path)
        assert want in (again.identity, None) and not path.with_name(path.name + ".partial").exists()
        assert not list(tmp_path.glob("*.lock"))
    else:
        raise AssertionError("it never ended")


@pytest.mark.parametrize("how", RECORDINGS)
def test_a_key_that_was_cut_is_named(how: str, tmp_path: Path) -> None:
    path = tmp_path / "c"
    partial = path.with_name("c.partial")
    partial.mkdir()
    (partial / "key.json").touch()
    (partial / "done.jsonl").touch()
    with pytest.raises(CorruptCacheError, match=r"c\.partial/key\.json cannot be read .* Remove the folder"):
        RECORDINGS[how](path)
