"""Tasks: how batches become rows, and batches that a student writes itself."""

from tempering.tasks.base import Task
from tempering.tasks.classification import Classification
from tempering.tasks.generation import Generation
from tempering.tasks.on_policy import OnPolicy
from tempering.tasks.speculative import Speculative
from tempering.tasks.tokenizers import shared_vocabulary
from tempering.tasks.writing import Sampling

__all__ = ["Classification", "Generation", "OnPolicy", "Sampling", "Speculative", "Task", "shared_vocabulary"]
