"""Tasks: how batches become rows, and batches that a student writes itself."""

from tempering.tasks.aligned import Aligned
from tempering.tasks.base import Task
from tempering.tasks.classification import Classification
from tempering.tasks.detection import Detection
from tempering.tasks.generation import Generation
from tempering.tasks.graded import Graded
from tempering.tasks.on_policy import OnPolicy
from tempering.tasks.seq2seq import Seq2Seq
from tempering.tasks.sequence_level import SequenceLevel
from tempering.tasks.speculative import Speculative
from tempering.tasks.texts import TextClassification
from tempering.tasks.tokenizers import shared_vocabulary
from tempering.tasks.writing import Sampling

__all__ = [
    "Aligned",
    "Classification",
    "Detection",
    "Generation",
    "Graded",
    "OnPolicy",
    "Sampling",
    "Seq2Seq",
    "SequenceLevel",
    "Speculative",
    "Task",
    "TextClassification",
    "shared_vocabulary",
]
