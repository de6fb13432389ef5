"""Distillation in other libraries' trainers: ``integrations.huggingface``, ``lightning`` and ``sentence_embeddings``.

They are imported explicitly: ``from tempering.integrations.huggingface import DistillMixin``.
"""
