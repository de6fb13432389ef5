"""Distillation inside somebody else's trainer: ``adapters.huggingface`` and ``adapters.lightning``.

Neither is imported before it is named: ``from tempering.integrations.huggingface import DistillMixin``.
"""
