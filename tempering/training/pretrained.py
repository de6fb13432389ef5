"""A model trained once for all who need it: the first to come trains it, others wait and read its weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tempering.training.distill import CheckedOnly
from tempering.utils.files import file_lock, sha256_text


def trained(
    model: nn.Module, name: str, folder: str | Path, train: Callable[[Path], Any], *, key: Mapping[str, Any]
) -> dict[str, Any]:
    """Put trained weights into ``model``; what its run's records say of the last epoch, split -> metric -> value.

    Args:
        model: the net as it is built, which ``train`` trains in place.
        name: of the net, for its folder ``<folder>/<name>-<key's hash>``.
        folder: where such models lie. A lock in it keeps two processes from training one at once.
        train: called with the run's folder where it is not trained yet, or not to its end; it has to resume.
        key: what makes it this model: its data, seed, length and so on.

    Raises:
        CheckedOnly: where a self-check was asked for and the model would have to be trained first.
    """
    from safetensors.torch import load_file

    digest = sha256_text(json.dumps([name, key], sort_keys=True, default=str))
    place = Path(folder) / f"{name}-{digest[:10]}"
    with file_lock(place.with_name(place.name + ".lock")):
        facts = _facts(place)
        if facts.get("status") != "done":
            try:
                train(place)
            except CheckedOnly as checked:
                raise CheckedOnly(f"{checked}\n(of {name}, which is trained first: then check again)") from None
            facts = _facts(place)
    model.load_state_dict(load_file(place / "student.safetensors"))
    return {split: scores for split, scores in facts["result"]["last"].items() if split != "epoch"}


def _facts(place: Path) -> dict[str, Any]:
    path = place / "facts.json"
    return json.loads(path.read_text()) if path.is_file() and (place / "student.safetensors").is_file() else {}
