"""Distillation in other libraries' trainers: ``integrations.huggingface``, ``lightning`` and ``sentence_transformers``.

They are imported explicitly: ``from tempering.integrations.huggingface import DistillMixin``.
"""
