"""Build classifiers of timm, torchvision and transformers by name; the libraries are imported on first use."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tempering.utils.protocols import HasLogits
from tempering.utils.registry import suggest

LIBRARIES = ("timm", "torchvision", "transformers")


class Logits(nn.Module):
    """Wrap a model of transformers to return its logits only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Any) -> Tensor:
        output: HasLogits = self.model(**inputs) if isinstance(inputs, dict) else self.model(inputs)
        return output.logits


def from_library(library: str, name: str, *, classes: int, channels: int, pretrained: bool) -> nn.Module:
    """Build the library's model of that name with a head of ``classes``.

    Raises:
        ImportError: if the library is not installed or cannot be imported, stating the reason.
        ValueError: for a model that the library does not have.
    """
    builder = {"timm": _timm, "torchvision": _torchvision, "transformers": _transformers}[library]
    try:
        return builder(name, classes, channels, pretrained)
    except (ImportError, RuntimeError) as error:
        # a torchvision built for another torch raises RuntimeError at import
        if isinstance(error, ImportError) or "torchvision" in str(error):
            raise ImportError(
                f'{library}:{name} needs {library}, which cannot be imported ({error}): pip install "tempering[models]"'
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
    """Replace the last linear layer by one for ``classes`` outputs, unless it has that many."""
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
        sizes: dict[str, Any] = {"num_labels": classes, "num_channels": channels}
        try:
            config = AutoConfig.for_model(name, **sizes)  # an architecture, such as "vit": nothing is downloaded
        except ValueError:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False, **sizes)
        model = AutoModelForImageClassification.from_config(config, trust_remote_code=False)
    return Logits(model)
