import tempering.rollouts as _rollouts

from .base import Task as Task
from .classification import Classification as Classification
from .cross_tokenizer import CrossTokenizer as CrossTokenizer
from .detection import Detection as Detection
from .embeddings import Embeddings as Embeddings
from .embeddings import Similarity as Similarity
from .language_modeling import LanguageModeling as LanguageModeling
from .multi_label import Binary as Binary
from .multi_label import MultiLabel as MultiLabel
from .multi_label import Ordinal as Ordinal
from .privileged_context import PrivilegedContext as PrivilegedContext
from .ranking import Ranking as Ranking
from .regression import Regression as Regression
from .segmentation import Segmentation as Segmentation
from .seq2seq import Seq2Seq as Seq2Seq
from .teacher_weights import validation_weights as validation_weights
from .text_classification import TextClassification as TextClassification
from .tokenizers import shared_vocabulary as shared_vocabulary

GenerationScorer = _rollouts.GenerationScorer
OnPolicy = _rollouts.OnPolicy
Sampling = _rollouts.Sampling
SequenceLevel = _rollouts.SequenceLevel
Speculative = _rollouts.Speculative
