"""A model's own auxiliary loss, such as the load balancing of a mixture of experts, added to the method's loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from tempering.rollouts.decoders import unwrap_model
from tempering.rows import upcast_to_float32

COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")  # as transformers' models call it, the second in JetMoE


def auxiliary_loss(model: nn.Module, output: Any, coefficient: float | None = None) -> Tensor | None:
    """Return the auxiliary loss in a model's output, (), weighted and with gradient; None if there is none.

    transformers' mixtures of experts return ``aux_loss`` if ``config.output_router_logits`` is set, and add it to their
    own loss with ``router_aux_loss_coef``. Another model's ``aux_loss`` has weight 1.

    Args:
        model: the model, in any wrappers.
        output: its output.
        coefficient: the weight; None: the model's own.

    Raises:
        ValueError: for router logits without ``aux_loss``: these models compute it only beside their own loss.
    """
    is_mapping = isinstance(output, Mapping)
    fields = dict(cast("Mapping[str, Any]", output)) if is_mapping else dict[str, Any](getattr(output, "__dict__", {}))
    value = fields.get("aux_loss") if is_mapping else getattr(output, "aux_loss", None)
    if not isinstance(value, Tensor):
        routed = [name for name, x in fields.items() if str(name).endswith("router_logits") and x is not None]
        if routed:
            name, inputs = type(unwrap_model(model)).__name__, " and ".join(routed)
            raise ValueError(
                f"{name} returns {inputs}, and computes the auxiliary loss of its routers only together with its own "
                "loss, which distillation replaces. Set config.output_router_logits = False to train without it."
            )
        return None
    weight = _coefficient(model) if coefficient is None else coefficient
    return upcast_to_float32(value) * weight if weight and value.requires_grad else None


def _coefficient(model: nn.Module) -> float:
    """Return the weight that the model itself would use: its attribute, else that of its (text) config, else 1."""
    for module in model.modules():
        config = getattr(module, "config", None)
        for owner in (module, getattr(config, "text_config", None), config):
            for name in COEFFICIENTS:
                if isinstance(value := getattr(owner, name, None), int | float):
                    return float(value)
    return 1.0
