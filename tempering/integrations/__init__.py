"""Distillation in other libraries' trainers: ``integrations.huggingface`` and ``integrations.lightning``.

Both are imported explicitly: ``from tempering.integrations.huggingface import DistillMixin``.
"""
