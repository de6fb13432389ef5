"""Extract features of any model by module name with forward hooks."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from tempering.utils.state import unwrapped


class FeatureExtractor:
    """Outputs of named modules in the model's last forward; a context manager that holds forward hooks.

        with FeatureExtractor(model, ["stage3"]) as features:
            model(images)
            features["stage3"]  # (N, C, H, W)

    Of an output that is a tuple or a mapping, the first tensor is used. Names are those of ``model.named_modules()``;
    "" is the model itself. Names of a model inside torch.compile or DataParallel are those of the plain model. The
    output is that of the module, also if a later module overwrites it in place, such as ``nn.ReLU(inplace=True)``.
    A new forward of the model forgets the outputs of the one before.

    Raises:
        ValueError: for a name that the model does not have, with the most similar names.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.names = tuple(dict.fromkeys(names))
        model = unwrapped(model)
        modules = dict(model.named_modules())
        for name in self.names:
            if name not in modules:
                matches = difflib.get_close_matches(name, modules, n=3, cutoff=0.5) or list(model._modules)
                raise ValueError(
                    f"{type(model).__name__} has no module {name!r}. Did you mean "
                    f"{' or '.join(map(repr, matches))}? Names are those of model.named_modules()."
                )
        self._modules = {name: modules[name] for name in self.names}
        self._model = model
        self._outputs: dict[str, Output] = {}
        self._kept_intact = set[str]()  # names whose output nothing overwrites, so that it need not be copied
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        if not self._hooks:
            self._hooks = [self._model.register_forward_pre_hook(self._forget)]
            self._hooks += [m.register_forward_hook(self._make_hook(name)) for name, m in self._modules.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._outputs.clear()

    def __getitem__(self, name: str) -> Tensor:
        """Return the module's output.

        Raises:
            KeyError: for a module that was not named, or did not run in the last forward.
            RuntimeError: for an output that was overwritten in place in this forward and not in the first one.
        """
        if name not in self._modules:
            raise KeyError(f"{name!r} is not extracted; these are: {', '.join(self.names) or 'none'}.")
        if name not in self._outputs:
            raise KeyError(
                f"the module {name!r} did not run in the last forward, or the context was exited. A module that runs "
                "in training mode only, such as an auxiliary head, has no output in eval mode."
            )
        output = self._outputs[name]
        intact = not output.original.is_inference() and output.original._version == output.version
        if output.copied:
            (self._kept_intact.add if intact else self._kept_intact.discard)(name)
        elif not intact:
            self._kept_intact.discard(name)
            raise RuntimeError(
                f"the output of {name!r} was overwritten in place, which it was not in the forward before. Name the "
                "module that overwrites it, or construct that with inplace=False."
            )
        return output.tensor

    def _forget(self, *_: object) -> None:
        self._outputs.clear()

    def _make_hook(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            original = _first_tensor(output, name)
            if torch.compiler.is_compiling() or original.is_inference():
                self._outputs[name] = Output(original.clone(), original, None, copied=True)
                return
            copied = name not in self._kept_intact
            self._outputs[name] = Output(original.clone() if copied else original, original, original._version, copied)

        return hook


class Output(NamedTuple):
    """An output of a module.

    Attributes:
        tensor: its value.
        original: the tensor that the module returned, which a later module may overwrite.
        version: of the original when it was returned, which counts changes in place; None if it is not known.
        copied: whether ``tensor`` is a copy.
    """

    tensor: Tensor
    original: Tensor
    version: int | None
    copied: bool


def _first_tensor(output: Any, name: str) -> Tensor:
    if isinstance(output, Tensor):
        return output
    values = output.values() if hasattr(output, "values") else output
    if isinstance(output, (tuple, list)) or hasattr(output, "values"):
        for value in values:
            if isinstance(value, Tensor):
                return value
    raise TypeError(f"the module {name!r} returns {type(output).__name__}, which contains no tensor.")
