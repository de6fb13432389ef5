from .chunked import Chunked as Chunked
from .chunked import chunked as chunked
from .linear import linear_loss as linear_loss
