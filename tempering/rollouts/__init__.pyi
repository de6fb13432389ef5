from .generation_config import Sampling as Sampling
from .on_policy import OnPolicy as OnPolicy
from .scoring import GenerationScorer as GenerationScorer
from .sequence_level import SequenceLevel as SequenceLevel
from .speculative import Speculative as Speculative
