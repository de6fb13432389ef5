"""Tasks: how batches become rows."""

from tempering.tasks.base import Task
from tempering.tasks.classification import Classification

__all__ = ["Classification", "Task"]
