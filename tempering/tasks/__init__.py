"""Tasks: how batches become rows, and batches that a student writes itself."""

from tempering.rollouts.on_policy import OnPolicy
from tempering.rollouts.sampling import Sampling
from tempering.rollouts.scoring import Graded
from tempering.rollouts.sequence_level import SequenceLevel
from tempering.rollouts.speculative import Speculative
from tempering.tasks.base import Task
from tempering.tasks.classification import Classification
from tempering.tasks.cross_tokenizer import Aligned
from tempering.tasks.detection import Detection
from tempering.tasks.language_modeling import Generation
from tempering.tasks.seq2seq import Seq2Seq
from tempering.tasks.text_classification import TextClassification
from tempering.tasks.tokenizers import shared_vocabulary

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
