"""Load training batches, sharded over ranks and resumable at any batch."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    TensorDataset,
)

from tempering.training.checkpoint import is_plain, random_state, set_random_state
from tempering.training.distributed import all_gather_objects
from tempering.utils.tensors import batch_digests, tensor_bytes, to_device

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from tempering.data.protocols import SeekableLoader, ShardableLoader


DATALOADER_PARTS = ("sampler", "batch_sampler", "dataset")  # they may have epochs, and so may a batch sampler's sampler
DATALOADER_OPTIONS = (
    *("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "generator"),
    *("prefetch_factor", "persistent_workers"),
)
# where a part of a loader keeps another one, which may have generators of random numbers
INNER = (
    *DATALOADER_PARTS,
    "batches",
    "loader",
    "datasets",
    "transform",
    "transforms",
    "target_transform",
    "collate_fn",
)

HASHED = 1 << 28  # bytes of stored data that are hashed
SAMPLES = 16  # of a data set that are hashed
LARGE = 1 << 16  # elements of a tensor that is not hashed as a setting
EMPTY = "the training loader yields no batches. Is the data set empty, or smaller than a batch?"


class MovableLoader(Protocol):
    """A loader that can keep its data on a device."""

    def to(self, device: torch.device, /) -> Iterable[Any]:
        """Return a loader whose batches are on the device."""
        ...


class StatefulLoader(Protocol):
    """A loader that can continue where it was, such as torchdata's StatefulDataLoader."""

    def state_dict(self) -> dict[str, Any]:
        """Return where the present iteration is."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Let the next iteration continue there."""
        ...

    def __iter__(self) -> Iterator[Any]: ...


class ResumableLoader:
    """The training batches of this rank, by epoch, starting at any batch.

    Uses the methods of the protocols in ``tempering.data.protocols`` that the loader has: ``iterate(start)``,
    ``set_epoch(epoch)`` and ``shard(rank, world)``. With several processes, a DataLoader's samples are split over them,
    each in one process. Generators of the loader, its samplers, data set and transforms are seeded by epoch: those of
    torch with their initial seed plus the epoch. ``restore`` gives them back as they were. A stateful loader continues
    from its state (``state``). Any other iterable is iterated from the beginning, and batches before the start are
    dropped. After resuming, only augmentation in persistent workers differs: their random state is not restored.

    Raises:
        ValueError: for an iterator, or with several processes for a loader that cannot be sharded, or not evenly.
    """

    def __init__(self, batches: Iterable[Any], fabric: Fabric, *, seed: int = 0) -> None:
        require_reiterable("batches", batches)
        self.seed, self.fabric = seed, fabric
        if fabric.world_size > 1:
            if isinstance(batches, DataLoader):
                batches = _distribute(cast("DataLoader[Any]", batches), fabric, seed)
            elif _is_shardable(batches):
                batches = batches.shard(fabric.global_rank, fabric.world_size)
            else:
                raise ValueError(
                    f"{type(batches).__name__} cannot be split over {fabric.world_size} processes. Use a DataLoader, "
                    "or give it shard(rank, world)."
                )
        if fabric.device.type != "cpu" and _is_movable(batches):
            batches = batches.to(fabric.device)
        self.batches = batches
        # with a DataLoader, also its samplers and data set may have epochs
        self.parts: list[Any] = [batches, *(getattr(batches, name, None) for name in DATALOADER_PARTS)]
        inner = getattr(getattr(batches, "batch_sampler", None), "sampler", None)
        self.parts += [] if any(part is inner for part in self.parts) else [inner]
        self.generators = [Borrowed(g) for g in find_generators(batches)]
        # (batch, epoch, number in the epoch) -> the batch to train on
        self.change: Callable[[Any, int, int], Any] | None = None

    def __len__(self) -> int:
        """The number of batches in an epoch."""
        try:
            return len(cast("Sized", self.batches))
        except TypeError:
            raise ValueError(
                f"{type(self.batches).__name__} has no length, so an epoch has none. Give steps= instead of epochs=."
            ) from None

    def epoch(self, number: int, start: int, state: Mapping[str, Any] | None = None) -> Iterator[Any]:
        """Iterate over the batches of an epoch, beginning with batch ``start``, where ``state`` is the loader's."""
        batches, change = self._from(number, start, state), self.change
        if change is None:
            return batches
        return (change(batch, number, i) for i, batch in enumerate(batches, start))

    def _from(self, number: int, start: int, state: Mapping[str, Any] | None) -> Iterator[Any]:
        self.set_epoch(number)
        if _is_seekable(self.batches):
            return iter(self.batches.iterate(start))
        if start and state is not None and _is_stateful(self.batches):
            self.batches.load_state_dict(dict(state))
            return iter(self.batches)
        iterator = iter(self.batches)
        for _ in range(start):
            next(iterator, None)
        return iterator

    def state(self) -> dict[str, Any] | None:
        """Return the state of a stateful loader after the batches that were taken; None of others.

        torchdata's StatefulDataLoader is one if its data set has a state, which workers then continue from. With any
        other data set it would continue without the random state of its workers, and with a shuffled one of Hugging
        Face without the samples in its buffer, so batches are dropped instead.
        """
        if _is_seekable(self.batches) or not _is_stateful(self.batches):
            return None
        state = self.batches.state_dict()
        return state if is_plain(state) else None

    def set_epoch(self, number: int, *, torch_only: bool = False) -> None:
        """Select the epoch of every part, and seed the generators, or only those of torch, by it."""
        for part in self.parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(number)
        for generator in self.generators:
            if not torch_only or isinstance(generator.generator, torch.Generator):
                generator.set_epoch(number)

    def fingerprint(self, batches: int = 2, *, keep_states: bool = True) -> dict[str, str]:
        """Hash every tensor and value in the first batches of epoch 0, of all ranks, from the run's own random state.

        Of a loader whose batches depend on the student, such as generated texts, those of the loader in it are hashed.

        Args:
            keep_states: False lets the generators of numpy and random in the loader run on, as an unseeded one would.

        Returns:
            "rank/batch/path" -> hash, equal on all ranks.
        """
        source = _innermost(self.batches)
        before = random_state()
        reseed(self.seed, 0, self.fabric.global_rank)
        self.set_epoch(0, torch_only=not keep_states)
        found: dict[str, str] = {}
        for number, batch in enumerate(cast("Iterable[Any]", itertools.islice(iter(source), batches))):
            found |= {f"{number}{path}": digest for path, digest in batch_digests(batch).items()}
        set_random_state(before)
        return self._of_ranks(found)

    def samples(self, splits: Mapping[str, Any], *, again: bool = False) -> dict[str, str]:
        """Hash what the loader and the evaluation splits hold (``sample_digests``): "rank/split/path" -> hash."""
        sources = {"train": self.batches, **splits}
        found = {name: sample_digests(source, self.seed, again=again) for name, source in sources.items()}
        return self._of_ranks({f"{name}{path}": d for name, own in found.items() for path, d in own.items()})

    def _of_ranks(self, found: dict[str, str]) -> dict[str, str]:
        of_ranks = all_gather_objects(found, self.fabric)
        return {f"{rank}/{path}": digest for rank, own in enumerate(of_ranks) for path, digest in own.items()}

    def first(self) -> Any:
        """Load the first batch of the run, on the device, and restore all random states.

        Raises:
            ValueError: if there is none.
        """
        before = random_state()
        reseed(self.seed, 0, self.fabric.global_rank)
        batch = next(self.epoch(0, 0), None)
        self.restore()
        set_random_state(before)
        if batch is None:
            raise ValueError(EMPTY)
        return to_device(batch, self.fabric.device)

    def later(self) -> Iterator[Any]:
        """Load the batches after the first one, on the device; the caller restores the global random state."""
        reseed(self.seed, 0, self.fabric.global_rank)
        for batch in self.epoch(0, 1):
            yield to_device(batch, self.fabric.device)

    def restore(self) -> None:
        """Give the generators of the loader back as they were, so that another run with it gets the same numbers."""
        for generator in self.generators:
            generator.restore()


class Borrowed:
    """A generator of random numbers that belongs to the caller: seeded by epoch, and given back as it was.

    Args:
        generator: of torch, numpy or random.
    """

    def __init__(self, generator: Any) -> None:
        self.generator = generator
        self.state = self._get()

    def set_epoch(self, number: int) -> None:
        """Seed the generator by its state at the start and the epoch; epoch 0 of numpy and random is that state."""
        g = self.generator
        if isinstance(g, torch.Generator):
            self.restore()
            g.manual_seed((g.initial_seed() + number) % 2**63)
            return
        if not number:
            self.restore()
            return
        seed = int.from_bytes(hashlib.sha256(f"{self.state!r}/{number}".encode()).digest()[:4], "little")
        if isinstance(g, np.random.Generator):
            g.bit_generator.state = type(g.bit_generator)(seed).state  # pyright: ignore[reportCallIssue]
        else:
            g.seed(seed)

    def restore(self) -> None:
        """Give the generator the state that it had at the start."""
        g, state = self.generator, self.state
        if isinstance(g, np.random.Generator):
            g.bit_generator.state = state
        elif isinstance(g, random.Random):
            g.setstate(state)
        else:
            g.set_state(state)

    def _get(self) -> Any:
        g = self.generator
        if isinstance(g, np.random.Generator):
            return g.bit_generator.state
        return g.getstate() if isinstance(g, random.Random) else g.get_state()


def find_generators(part: Any, depth: int = 5) -> list[Any]:
    """Return the generators of random numbers of a loader and of its parts, each once; not the global ones."""
    found: dict[int, Any] = {}
    seen: set[int] = set()

    def visit(part: Any, depth: int) -> None:
        if depth < 0 or id(part) in seen or isinstance(part, (type, str, bytes, Tensor, np.ndarray)):
            return
        seen.add(id(part))
        if isinstance(part, (list, tuple)):
            for item in cast("list[Any]", part[:64]):
                if hasattr(item, "__dict__"):
                    visit(item, depth - 1)
            return
        own = getattr(part, "__dict__", {})
        for value in (*own.values(), getattr(part, "generator", None)):
            if isinstance(value, (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)):
                found[id(value)] = value
        for name in INNER:
            visit(own.get(name), depth - 1)

    visit(part, depth)
    for everyones in (np.random.mtrand._rand, getattr(random, "_inst", None), torch.default_generator):  # pyright: ignore
        found.pop(id(everyones), None)
    return list(found.values())


def _innermost(batches: Any) -> Any:
    """Return the loader in loaders whose batches depend on the student, up to one that has an identity."""
    while getattr(batches, "batches", None) is not None and getattr(batches, "identity", None) is None:
        batches = batches.batches
    return batches


def sample_digests(batches: Any, seed: int, *, again: bool = False) -> dict[str, str]:
    """Hash the samples of a loader without an identity: path -> hash; all random states are restored.

    Of a list of batches, and of the tensors of a TensorDataset, that is everything up to ``HASHED`` bytes, and rows at
    equal distances of more; of another data set of a DataLoader ``SAMPLES`` samples at equal distances.

    Args:
        again: load the samples twice, and hash the second ones, to tell those that differ whenever they are loaded.
    """
    source = _innermost(batches)
    if getattr(source, "identity", None) is not None:
        return {}
    before, generators = random_state(), [Borrowed(g) for g in find_generators(source)]
    try:
        for _ in range(1 + again):
            reseed(seed, 0, 0)
            found = _digests(source)
        return found  # pyright: ignore[reportPossiblyUnboundVariable]
    finally:
        for generator in generators:
            generator.restore()
        set_random_state(before)


def _digests(source: Any) -> dict[str, str]:
    if isinstance(source, (list, tuple)):
        stored = cast("Sequence[Any]", source)
        size = sum(x.nbytes for x in tree_leaves(stored) if isinstance(x, (Tensor, np.ndarray)))
        parts: dict[str, list[str]] = {}
        for i in _spread(len(stored), len(stored) if size <= HASHED else SAMPLES):
            for path, digest in batch_digests(stored[i]).items():
                parts.setdefault(path, []).append(digest)
        return {path: hashlib.sha256(repr(digests).encode()).hexdigest()[:16] for path, digests in parts.items()}
    dataset: Any = cast("Any", source).dataset if isinstance(source, DataLoader) else None
    if dataset is None or isinstance(dataset, IterableDataset):
        return {}
    if type(dataset) is TensorDataset:
        return batch_digests([x[:: 1 + x.nbytes // HASHED] if x.ndim else x for x in dataset.tensors])
    try:
        return batch_digests({str(i): dataset[i] for i in _spread(len(dataset), SAMPLES)})
    except Exception:  # it is not indexed by 0 to N - 1; a fault shows when a batch is loaded
        return {}


def _spread(n: int, most: int) -> list[int]:
    """Return at most this many of n indices at equal distances, the first and the last among them."""
    return [round(i * (n - 1) / (most - 1)) for i in range(most)] if n > most > 1 else list(range(n))


def settings_of(part: Any) -> dict[str, Any]:
    """Return the class of an object and those of its constructor's arguments that it keeps, JSON-able.

    Plain values are kept as they are, tensors by their hash, others by the name of their function or class.
    """
    out: dict[str, Any] = {"name": type(part).__name__}
    try:
        parameters = inspect.signature(cast("Any", type(part))).parameters.values()
        names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name in vars(part)]
    except (TypeError, ValueError):
        return out
    return out | {name: _plain(getattr(part, name)) for name in names}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        items = cast("list[Any]", value)
        return [_plain(item) for item in items] if len(items) <= 64 else f"{len(items)} items"
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value)
        return {str(key): _plain(item) for key, item in items.items()} if len(items) <= 64 else f"{len(items)} items"
    if isinstance(value, Tensor):
        if value.numel() > LARGE:
            return f"{value.dtype} {tuple(value.shape)}"
        return hashlib.sha256(bytes(tensor_bytes(value))).hexdigest()[:16]
    return getattr(value, "__qualname__", type(value).__name__)


def loader_settings(batches: Any) -> dict[str, Any]:
    """Return what is known of a loader besides its batches: lengths, settings, and transforms by their repr."""
    out: dict[str, Any] = {"batches": _length(batches)}
    if isinstance(batches, DataLoader):
        loader: Any = cast("Any", batches)
        out["samples"] = _length(loader.dataset)
        transforms = {name: getattr(loader.dataset, name, None) for name in ("transform", "target_transform")}
        texts = {name: repr(value) for name, value in transforms.items() if value is not None}
        return out | {name: text for name, text in texts.items() if " at 0x" not in text}
    if getattr(batches, "identity", None) is not None:
        out |= settings_of(batches)
    inner = getattr(batches, "batches", None)
    if inner is not None and inner is not batches and not isinstance(inner, (list, tuple)):
        out["of"] = loader_settings(inner)
    return out


def _length(part: Any) -> int | None:
    try:
        return len(part)
    except (TypeError, NotImplementedError):
        return None


def micro_batches(batches: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Yield lists of ``size`` micro-batches, one list per optimizer step; the last list may be shorter."""
    while group := list(itertools.islice(batches, size)):
        yield group


def reseed(seed: int, epoch: int, rank: int) -> None:
    """Seed every global generator by (seed, epoch, rank), so that an epoch does not depend on those before it."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{rank}".encode()).digest()
    value = int.from_bytes(digest[:4], "little")
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)  # pyright: ignore[reportUnknownMemberType]


def require_reiterable(name: str, batches: Iterable[Any]) -> None:
    """Reject what is no loader of batches: one-shot iterators, data sets, and splits by name.

    Raises:
        ValueError: naming the argument, with what to write.
    """
    kind = type(cast("Any", batches)).__name__
    if isinstance(batches, Mapping):
        raise ValueError(
            f"{name} must be a loader of batches, such as a DataLoader; got a {kind} with "
            f"{', '.join(map(repr, [*cast('Mapping[str, Any]', batches)][:4]))}. Give one loader for each split."
        )
    if isinstance(batches, Dataset) and not hasattr(type(batches), "__iter__"):
        raise ValueError(
            f"{name} must be a loader of batches; got the data set {kind}, whose items are samples. Write "
            "DataLoader(dataset, batch_size=64), or batch_size=None if its items are batches."
        )
    if isinstance(batches, Iterator):
        raise ValueError(
            f"{name} is an iterator, which can be iterated over only once and not resumed. Pass an iterable that "
            "starts again at every iter(), such as a DataLoader, a list, or tempering.data.Batches."
        )


def _is_shardable(batches: Iterable[Any]) -> TypeGuard[ShardableLoader[Any]]:
    return hasattr(batches, "shard")  # only this member: isinstance() would compute the loader's identity


def _is_seekable(batches: Iterable[Any]) -> TypeGuard[SeekableLoader[Any]]:
    return hasattr(batches, "iterate")


def _is_stateful(batches: Any) -> TypeGuard[StatefulLoader]:
    parts = (batches, getattr(batches, "dataset", None))
    if type(parts[1]).__module__.startswith("datasets."):  # the state of a shuffled one leaves out its buffer
        return False
    return all(hasattr(part, name) for part in parts for name in ("state_dict", "load_state_dict"))


def _is_movable(batches: Iterable[Any]) -> TypeGuard[MovableLoader]:
    return hasattr(batches, "to")


def _distribute(loader: Any, fabric: Fabric, seed: int) -> Iterable[Any]:
    """Return a DataLoader of this rank's samples; the order is drawn with the run's seed, and equal on all ranks."""
    from lightning_fabric.utilities import data as of_fabric

    sampler: Any = loader.sampler
    if of_fabric.has_iterable_dataset(loader):
        _check_sharded(loader, fabric, seed)
        return loader
    if isinstance(sampler, DistributedSampler):
        return loader
    inner = RankSampler(getattr(loader.batch_sampler, "sampler", sampler), loader, fabric, seed)
    plain = (type(loader), type(loader.batch_sampler)) == (DataLoader, BatchSampler)
    if loader.batch_size is None and plain:
        kept = {name: getattr(loader, name) for name in DATALOADER_OPTIONS}
        return cast("Any", DataLoader)(
            loader.dataset, batch_sampler=BatchSampler(inner, inner.batch_size, inner.drop_last), **kept
        )
    # as Fabric's setup_dataloaders does with a DistributedSampler; classes that inherit from DataLoader are kept
    return cast("Any", of_fabric)._update_dataloader(loader, inner)


def _check_sharded(loader: Any, fabric: Fabric, seed: int) -> None:
    """Check that an iterable data set knows its rank: from one random state, each rank has another first batch."""
    before = random_state()
    reseed(seed, 0, 0)
    first = batch_digests(next(iter(loader), None))
    set_random_state(before)
    everyones = all_gather_objects(first, fabric)
    if all(other == everyones[0] for other in everyones):
        raise ValueError(
            f"{type(loader.dataset).__name__} yields the same samples in each of {len(everyones)} processes, so all "
            "would be seen several times. Let it skip by torch.distributed.get_rank(), or use a data set with indices."
        )


class RankSampler(Sampler[int]):
    """This rank's samples of any sampler, each in one process; the parts are as equal as can be.

    Every rank draws the order of all samples from the same random state, and takes every world-th of them. An order of
    RandomSampler is that of torch's DistributedSampler.

    Raises:
        ValueError: if the ranks would have different numbers of batches, or drew different orders.
    """

    def __init__(self, sampler: Any, loader: Any, fabric: Fabric, seed: int) -> None:
        self.sampler, self.fabric, self.seed, self.number = sampler, fabric, seed, 0
        size = getattr(loader.batch_sampler, "batch_size", loader.batch_size)
        self.batch_size, self.drop_last = size or 1, bool(getattr(loader.batch_sampler, "drop_last", loader.drop_last))
        self.count = len(sampler)
        self._part(range(self.count))

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch, of the sampler too."""
        self.number = epoch
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._part(range(self.count)))

    def __iter__(self) -> Iterator[int]:
        return iter(self._part(self._order()))

    def _order(self) -> list[int]:
        sampler = self.sampler
        if type(sampler) is RandomSampler and not sampler.replacement and self.count == len(sampler.data_source):
            generator = torch.Generator().manual_seed(self.seed + self.number)
            return cast("list[int]", torch.randperm(self.count, generator=generator).tolist())  # pyright: ignore[reportUnknownMemberType]
        before = random_state()
        reseed(self.seed, self.number, 0)
        order = list(self.sampler)
        set_random_state(before)
        digests = all_gather_objects(hashlib.sha256(repr(order).encode()).hexdigest(), self.fabric)
        if len(set(digests)) > 1:
            raise ValueError(
                f"{type(self.sampler).__name__} draws another order in each of {len(digests)} processes, so samples "
                "would be seen twice or never. Seed its generator with the same number in all of them."
            )
        return order

    def _part(self, order: Sequence[int]) -> Sequence[int]:
        world, size = self.fabric.world_size, self.batch_size
        n = len(order) - len(order) % world if self.drop_last else len(order)
        counts = [len(range(r, n, world)) for r in (0, world - 1)]  # the most and the fewest
        batches = [count // size if self.drop_last else math.ceil(count / size) for count in counts]
        if batches[0] != batches[1]:
            raise ValueError(
                f"{n} samples in batches of {size} cannot be split over {world} processes: one would have {batches[0]} "
                f"batches, another {batches[1]}. Use drop_last=True, or another batch_size."
            )
        return order[self.fabric.global_rank : n : world]
