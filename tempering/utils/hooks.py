"""Features from any model by module name; no model is edited."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, Self

from torch import Tensor, nn


class FeatureExtractor:
    """What the named modules answered in the model's last forward; used as a context, or opened and closed.

        with FeatureExtractor(model, ["stage3"]) as taps:
            model(images)
            taps["stage3"]  # (N, C, H, W)

    A module that answers a tuple or a mapping gives its first tensor. Names are those of ``model.named_modules()``; ""
    is the model itself.

    Raises:
        ValueError: for a name that the model does not have, with the nearest ones.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.names = tuple(dict.fromkeys(names))
        modules = dict(model.named_modules())
        for name in self.names:
            if name not in modules:
                near = difflib.get_close_matches(name, modules, n=3, cutoff=0.5) or list(model._modules)
                raise ValueError(
                    f"{type(model).__name__} has no module {name!r} to tap. Did you mean "
                    f"{' or '.join(map(repr, near))}? Names are those of model.named_modules()."
                )
        self._modules = {name: modules[name] for name in self.names}
        self._seen: dict[str, Tensor] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        if not self._hooks:
            self._hooks = [m.register_forward_hook(self._keeper(name)) for name, m in self._modules.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._seen.clear()

    def __getitem__(self, name: str) -> Tensor:
        """The tensor that the module answered.

        Raises:
            KeyError: where it was not named, or has not run since the taps were opened.
        """
        if name not in self._modules:
            raise KeyError(f"{name!r} is not tapped; these are: {', '.join(self.names) or 'none'}.")
        if name not in self._seen:
            raise KeyError(f"the module {name!r} did not run in the last forward, or the taps are closed.")
        return self._seen[name]

    def _keeper(self, name: str) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            self._seen[name] = _first_tensor(output, name)

        return keep


def _first_tensor(output: Any, name: str) -> Tensor:
    if isinstance(output, Tensor):
        return output
    values = output.values() if hasattr(output, "values") else output
    if isinstance(output, (tuple, list)) or hasattr(output, "values"):
        for value in values:
            if isinstance(value, Tensor):
                return value
    raise TypeError(f"the module {name!r} answers {type(output).__name__}, in which there is no tensor to tap.")
