"""Build a network from its description, which ``training.pretrained.describe`` returns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tempering.models.external import Logits
from tempering.models.normalized import Normalized

Spec = Mapping[str, Any]


def rebuild(spec: Spec, folder: Path | None = None) -> nn.Module:
    """Build the network of a description, with initial weights. No code is taken from the description.

    Args:
        spec: of ``describe``.
        folder: of ``save_pretrained`` with the weights of a model of transformers.

    Raises:
        ValueError: for a description of an unknown kind, or a class that transformers does not have.
    """
    kind = spec.get("kind")
    if kind == "normalized":
        return Normalized(rebuild(spec["net"]), mean=spec["mean"], std=spec["std"])
    if kind == "build":
        from tempering.models.factory import build

        return build(spec["name"], classes=spec["classes"], channels=spec["channels"])
    if kind == "timm":
        import timm  # pyright: ignore

        return timm.create_model(spec["name"], pretrained=False, **spec["arguments"])
    if kind == "detector":
        from tempering.models.external_detectors import detector

        return detector(spec["name"], classes=spec["classes"])
    if kind == "transformers":
        import transformers

        found = getattr(transformers, spec["class"], None)
        if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
            raise ValueError(f"transformers {transformers.__version__} has no model class {spec['class']!r}.")
        if folder is not None:
            model: Any = found.from_pretrained(str(folder), use_safetensors=True)
        else:
            model = found(found.config_class.from_dict(dict(spec["config"])))  # pyright: ignore
        return Logits(model) if spec.get("logits") else model
    raise ValueError(f"a network is of the kind build, normalized, timm, detector or transformers; got {kind!r}.")
