"""Restore what a run changes besides weights: modes and hooks of models, the random state, the environment."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from tempering.utils.device import is_distributed

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# attribute, package of the wrapper
WRAPPERS = (("_orig_mod", "torch._dynamo"), ("module", "torch.nn.parallel"), ("_original_module", "lightning_fabric"))

# names of the parameters that a teacher has frozen; a parameter with a weak reference cannot be moved by swapping
_FROZEN: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


class ModelState:
    """The training mode of every module, requires_grad of every parameter, and the hooks of some models."""

    def __init__(self, *models: nn.Module | None) -> None:
        modules = dict.fromkeys(module for model in models if model is not None for module in model.modules())
        self.modes = {module: module.training for module in modules}
        self.requires_grad = [(p, p.requires_grad) for m in modules for p in m._parameters.values() if p is not None]
        self.hooks = [(module, name, frozenset(getattr(module, name))) for module in modules for name in HOOKS]

    def freeze(self) -> None:
        """Freeze the parameters; ``frozen_by_teachers`` tells those that required grad before, until ``restore``."""
        _FROZEN.update(self._requiring_grad())
        for p, _ in self.requires_grad:
            p.requires_grad_(False)

    def _requiring_grad(self) -> dict[nn.Module, set[str]]:
        """Return the names of the parameters that required grad, by module."""
        required = {id(p) for p, requires_grad in self.requires_grad if requires_grad}
        named = ((module, {n for n, p in module._parameters.items() if id(p) in required}) for module in self.modes)
        return {module: names for module, names in named if names}

    def restore(self, *, hooks: bool = True) -> None:
        """Give the models back as they were; hooks that were registered since are removed, unless ``hooks=False``."""
        for module, training in self.modes.items():
            module.training = training
        for p, requires_grad in self.requires_grad:
            if p.requires_grad != requires_grad:  # a lazy parameter cannot be set at all
                p.requires_grad_(requires_grad)
        for module in self._requiring_grad():
            _FROZEN.pop(module, None)
        for module, name, before in self.hooks if hooks else ():
            if not hasattr(type(module), "_get_fsdp_state"):  # a sharded module cannot run without its hooks
                registered: dict[int, Any] = getattr(module, name)
                for added in set(registered) - before:
                    del registered[added]

    def train(self, model: nn.Module) -> None:
        """Put ``model`` in training mode, but leave modules in eval mode that were so in a model in training mode.

        So a student whose normalization was frozen by ``module.eval()`` keeps it frozen. Of a model that was in eval
        mode itself, as ``from_pretrained`` returns it, everything is trained.
        """
        model.train()
        root = next(iter(self.modes), None)
        if root is not None and self.modes[root]:
            for module, training in self.modes.items():
                module.training = module.training and training


def frozen_by_teachers(model: nn.Module) -> list[str]:
    """Return the parameters that do not require grad because a teacher has frozen them, not their user."""
    frozen = {id(module._parameters.get(name)) for module, names in _FROZEN.items() for name in names}
    return [name for name, p in model.named_parameters() if not p.requires_grad and id(p) in frozen]


@contextmanager
def restored(*models: nn.Module | None) -> Iterator[None]:
    """Restore training modes, requires_grad and hooks of the models at exit."""
    state = ModelState(*models)
    try:
        yield
    finally:
        state.restore()


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside torch.compile, DataParallel, DistributedDataParallel or Fabric, or else the model."""
    for name, package in WRAPPERS:
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module) and type(model).__module__.startswith(package):
            return unwrapped(inner)
    return model


def random_state() -> dict[str, Any]:
    """Return the state of every global random number generator."""
    version, words, gauss = random.getstate()
    kind, keys, pos, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [kind, torch.as_tensor(np.asarray(keys).astype(np.int64)), pos, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = list(torch.cuda.get_rng_state_all())
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore the global random number generators."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, pos, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), pos, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def borrowed(*models: nn.Module | object | None) -> Iterator[None]:
    """Restore at exit what a run changes besides weights.

    That is the training mode of every module, requires_grad of every parameter and the hooks of the models, the global
    random state, and, in a single process, the environment: the processes of a distributed run still need theirs.

    Args:
        models: modules; anything else, such as a Teacher that its user made, is left as it is.
    """
    state = ModelState(*(model for model in models if isinstance(model, nn.Module)))
    numbers, environment = random_state(), dict(os.environ)
    try:
        yield
    finally:
        state.restore()
        set_random_state(numbers)
        if not is_distributed():
            for name in set(os.environ) - set(environment):
                del os.environ[name]
            os.environ.update(environment)
