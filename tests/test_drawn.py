"""Draws packed into bits: nothing is lost, little is stored, and damage is named."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from tempering.data import Pairs, Tokens
from tempering.data.text import TextExample
from tempering.objectives import kl
from tempering.rows import Rows
from tempering.tasks import LanguageModeling, Seq2Seq
from tempering.teachers import Cached, CachedHidden, CachedSampled, Live, TopKTeacher, record_sampled, record_top_k
from tempering.teachers.cache.base import CorruptCacheError
from tempering.teachers.cache.sampled import pack_counts, unpack_counts
from tempering.teachers.outputs import to_top_k_plus_tail
from tempering.teachers.selection import count_samples, shares
from tempering.temperature import Static
from tests.conftest import random_rows
from tests.test_generation import PAD, gpt2, texts
from tests.test_seq2seq import pairs, t5

TASK = LanguageModeling()


@pytest.mark.parametrize(
    ("vocabulary", "samples", "width"), [(131_072, 127, 3), (152_064, 50, 3), (257, 50, 2), (5, 1, 1)]
)
def test_what_is_packed_is_what_was_drawn(vocabulary: int, samples: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(2 * 7, 40, generator=generator) ** 6 + 1e-9
    tokens = torch.randint(vocabulary, (40,), generator=generator)
    tokens[0] = vocabulary - 1
    p[0], p[0, 0] = 0.0, 1.0  # one token, always
    draws = tokens[torch.multinomial(p, samples, replacement=True, generator=generator)].view(2, 7, samples)
    want = count_samples(draws)
    counts = (want.logp.exp() * samples).round().long()
    counts[1, 3] = 0  # a position of padding
    held = pack_counts(want.ids, counts)
    assert held["words"].shape[1] == width and len(held["words"]) == int((counts > 0).sum())
    for row in range(2):
        words = held["words"][held["start"][row] : held["start"][row + 1]]
        ids, found = unpack_counts(words, held["kinds"][row], int(held["bits"]))
        dense = [torch.zeros(7, vocabulary, dtype=torch.long) for _ in range(2)]
        dense[0].scatter_add_(1, ids, found)
        dense[1].scatter_add_(1, want.ids[row] * (counts[row] > 0), counts[row])
        assert torch.equal(*dense)


def test_a_position_takes_about_as_many_bytes_as_the_paper_says(tmp_path: Path) -> None:
    """3 bytes for each different token, a byte, and 32 a text."""
    length, examples = 64, [TextExample(tuple(range(i, i + 64)), (True,) * 64) for i in range(8)]
    model = gpt2(12, 1, 70_000).float()
    with torch.no_grad():
        model.transformer.wte.weight[64:].mul_(0.3)  # pyright: ignore
    TASK.prepare_model(model)
    tokens = Tokens(examples, batch_size=4)
    cached = record_sampled(
        TopKTeacher(Live(model), samples=50), tokens, tmp_path / "d", inputs=TASK.inputs, quiet=True
    )
    size = sum(file.stat().st_size for file in (tmp_path / "d").glob("*.safetensors"))
    batch = next(iter(tokens))
    found = cached(TASK.inputs(batch)[1], batch["ids"])
    held = cached.file("00000.safetensors")
    words, kinds = held.get_tensor("words"), held.get_tensor("kinds")
    assert words.shape[1] == 3 and int(kinds.sum()) == len(words)
    assert size < 3 * len(words) + 8 * length + 32 * 9 + 900  # and a header
    assert found.logp[:, :-1].exp().sum(-1).sub(1).abs().max() < 1e-5


def test_targets_are_unbiased_and_the_loss_is_never_negative() -> None:
    rows, n, samples = random_rows(2, 6, scale=1.5), 3000, 9
    p = rows.teacher.float().softmax(-1)
    draws = torch.multinomial(p, n * samples, replacement=True, generator=torch.Generator().manual_seed(1))
    want = count_samples(draws.view(2, n, samples))
    held = pack_counts(want.ids, (want.logp.exp() * samples).round().long())
    mean = torch.zeros_like(p)
    for row in range(2):
        words = held["words"][held["start"][row] : held["start"][row + 1]]
        ids, found = unpack_counts(words, held["kinds"][row], int(held["bits"]))
        mean[row].scatter_add_(0, ids.flatten(), found.flatten().float() / (n * samples))
        sparse = shares(ids, found.float(), samples, besides=torch.full((n,), 5))
        student = rows.student[row].float().expand(n, -1)
        said, taught, _ = to_top_k_plus_tail(student, sparse)
        T = Static(1.0)(random_rows(1))
        assert (kl(Rows(said, taught), T) >= 0).all()
        # a student that says just what was drawn
        dense = torch.full((n, 6), -torch.inf).scatter_reduce(1, sparse.ids, sparse.logp, "amax")
        said, taught, _ = to_top_k_plus_tail(dense, sparse)
        assert 0 <= float(kl(Rows(said, taught), T).max()) < 1e-6
    torch.testing.assert_close(mean, p, rtol=0.0, atol=0.01)


def data(**options: Any) -> Tokens:
    return Tokens(texts(), batch_size=2, pad=PAD, **options)


def kept(seed: int = 1, **how: Any) -> TopKTeacher:
    model = gpt2(12, seed).float()
    TASK.prepare_model(model)
    return TopKTeacher(Live(model), **how or {"samples": 6})


def test_damage_is_named_and_other_recordings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "d"
    ask = partial(record_top_k, path=path, inputs=TASK.inputs, quiet=True)
    cached = ask(kept(), data())
    assert isinstance(cached, CachedSampled)
    with pytest.raises(ValueError, match="its teacher is"):
        ask(kept(samples=7), data())
    with pytest.raises(ValueError, match="contains drawn tokens, and Cached reads logits"):
        Cached(path)
    with pytest.raises(ValueError, match="contains drawn tokens, and CachedHidden reads hidden states"):
        CachedHidden(path)
    with pytest.raises(ValueError, match=r"needs TopKTeacher\(samples=...\); got TopKTeacher\(top=3\)"):
        record_sampled(kept(top=3), data(), tmp_path / "e", inputs=TASK.inputs)
    name = path / "00000.safetensors"
    whole = name.read_bytes()
    name.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CorruptCacheError, match=r"00000\.safetensors was changed since it was recorded"):
        CachedSampled(path)
    name.write_bytes(whole)
    assert CachedSampled(path, batches=data(), teacher=kept()).identity == cached.identity


def test_of_an_encoder_decoder(tmp_path: Path) -> None:
    task, batches, model = Seq2Seq(), Pairs(pairs(), batch_size=2), t5(8, 1).float()
    task.prepare_model(model)
    teacher = TopKTeacher(Live(model), samples=6)
    cached = record_sampled(teacher, batches, tmp_path / "d", inputs=task.inputs, quiet=True)
    for batch in batches:
        _, inputs, ids = task.inputs(batch)
        place, target, _ = task._positions(batch)
        live, found = (
            source(inputs, ids).gather_positions(place, tuple(batch["labels"].shape)) for source in (teacher, cached)
        )
        dense = [torch.zeros(len(place), 40).scatter_add(1, k.ids, k.logp.exp()) for k in (live, found)]
        torch.testing.assert_close(*dense)
        assert torch.equal(found.ids[:, -1], target)


def looked_up(indices: list[int], *, cached: CachedSampled, tokens: Tokens) -> torch.Tensor:
    found = cached(TASK.inputs(tokens.batch(indices))[1], torch.tensor(indices))
    return torch.cat((found.ids.float(), found.logp), -1)


def test_many_workers_and_ranks_read_it(tmp_path: Path) -> None:
    tokens = data(shuffle=False)
    cached = record_sampled(kept(), tokens, tmp_path / "d", inputs=TASK.inputs, quiet=True)
    read = partial(looked_up, cached=cached, tokens=tokens)
    loader = DataLoader(range(5), batch_size=2, collate_fn=read, num_workers=2)  # pyright: ignore[reportArgumentType]
    for part, got in zip(([0, 1], [2, 3], [4]), loader, strict=True):
        torch.testing.assert_close(read(part), got, rtol=0.0, atol=0.0, equal_nan=True)
    shared = [[batch["ids"].tolist() for batch in tokens.shard(rank, 2)] for rank in (0, 1)]
    assert shared == [[[0], [2]], [[1], [3]]]  # the last batch has fewer texts than ranks
    for ids in shared[1]:
        assert cached.incompatibility(tokens.shard(1, 2)) is None and len(read(ids)) == 1
