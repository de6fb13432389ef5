"""Extract features of any model by module name with forward hooks."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, Self

from torch import Tensor, nn


class FeatureExtractor:
    """Outputs of named modules in the model's last forward; a context manager that registers forward hooks.

        with FeatureExtractor(model, ["stage3"]) as features:
            model(images)
            features["stage3"]  # (N, C, H, W)

    Of an output that is a tuple or a mapping, the first tensor is used. Names are those of ``model.named_modules()``;
    "" is the model itself.

    Raises:
        ValueError: for a name that the model does not have, with the most similar names.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.names = tuple(dict.fromkeys(names))
        modules = dict(model.named_modules())
        for name in self.names:
            if name not in modules:
                matches = difflib.get_close_matches(name, modules, n=3, cutoff=0.5) or list(model._modules)
                raise ValueError(
                    f"{type(model).__name__} has no module {name!r}. Did you mean "
                    f"{' or '.join(map(repr, matches))}? Names are those of model.named_modules()."
                )
        self._modules = {name: modules[name] for name in self.names}
        self._outputs: dict[str, Tensor] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        if not self._hooks:
            self._hooks = [m.register_forward_hook(self._make_hook(name)) for name, m in self._modules.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._outputs.clear()

    def __getitem__(self, name: str) -> Tensor:
        """Return the module's output.

        Raises:
            KeyError: for a module that was not named, or did not run since the context was entered.
        """
        if name not in self._modules:
            raise KeyError(f"{name!r} is not extracted; these are: {', '.join(self.names) or 'none'}.")
        if name not in self._outputs:
            raise KeyError(f"the module {name!r} did not run in the last forward, or the context was exited.")
        return self._outputs[name]

    def _make_hook(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self._outputs[name] = _first_tensor(output, name)

        return hook


def _first_tensor(output: Any, name: str) -> Tensor:
    if isinstance(output, Tensor):
        return output
    values = output.values() if hasattr(output, "values") else output
    if isinstance(output, (tuple, list)) or hasattr(output, "values"):
        for value in values:
            if isinstance(value, Tensor):
                return value
    raise TypeError(f"the module {name!r} returns {type(output).__name__}, which contains no tensor.")
