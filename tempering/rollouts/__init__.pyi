from .on_policy import OnPolicy as OnPolicy
from .sampling import Sampling as Sampling
from .scoring import GenerationScorer as GenerationScorer
from .sequence_level import SequenceLevel as SequenceLevel
from .speculative import Speculative as Speculative
