"""Classifiers of timm, torchvision and transformers by name; none is imported before it is asked for."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tempering.utils.registry import suggest

LIBRARIES = ("timm", "torchvision", "transformers")


class Logits(nn.Module):
    """A model of transformers that answers its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Any) -> Tensor:
        return self.model(**inputs).logits if isinstance(inputs, dict) else self.model(inputs).logits


def from_library(library: str, name: str, *, classes: int, channels: int, pretrained: bool) -> nn.Module:
    """The library's model of that name with a head of ``classes``.

    Raises:
        ImportError: where the library is not installed or does not import, saying why.
        ValueError: for a model that it does not have.
    """
    make = {"timm": _timm, "torchvision": _torchvision, "transformers": _transformers}[library]
    try:
        return make(name, classes, channels, pretrained)
    except (ImportError, RuntimeError) as error:
        # torchvision of another build than torch fails with a RuntimeError at import
        if isinstance(error, ImportError) or "torchvision" in str(error):
            raise ImportError(
                f"{library}:{name} needs {library}, which does not import here ({error}): "
                'pip install "tempering[models]"'
            ) from error
        raise


def _timm(name: str, classes: int, channels: int, pretrained: bool) -> nn.Module:
    import timm  # pyright: ignore[reportMissingImports]

    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}.{suggest(name, timm.list_models())} See timm.list_models().")
    return timm.create_model(name, pretrained=pretrained, num_classes=classes, in_chans=channels)


def _torchvision(name: str, classes: int, channels: int, pretrained: bool) -> nn.Module:
    from torchvision import models  # pyright: ignore[reportMissingImports]

    if name not in (known := models.list_models(module=models)):
        raise ValueError(f"torchvision has no classifier {name!r}.{suggest(name, known)} See models.list_models().")
    if channels != 3:
        raise ValueError(f"torchvision's classifiers take 3 channels; got channels={channels}.")
    if not pretrained:
        return models.get_model(name, weights=None, num_classes=classes)
    return _with_head(models.get_model(name, weights="DEFAULT"), classes)


def _with_head(net: nn.Module, classes: int) -> nn.Module:
    """The net with its last linear layer made anew for ``classes``, unless it fits."""
    path, last = [(n, m) for n, m in net.named_modules() if isinstance(m, nn.Linear)][-1]
    if last.out_features != classes:
        net.set_submodule(path, nn.Linear(last.in_features, classes))
    return net


def _transformers(name: str, classes: int, channels: int, pretrained: bool) -> nn.Module:
    from transformers import AutoConfig, AutoModelForImageClassification

    if pretrained:
        model = AutoModelForImageClassification.from_pretrained(
            name, num_labels=classes, ignore_mismatched_sizes=True, trust_remote_code=False
        )
    else:
        known: dict[str, Any] = {"num_labels": classes, "num_channels": channels}
        try:
            config = AutoConfig.for_model(name, **known)  # an architecture, such as "vit": nothing is fetched
        except ValueError:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False, **known)
        model = AutoModelForImageClassification.from_config(config, trust_remote_code=False)
    return Logits(model)
