from .factory import build as build
from .factory import load as load
from .factory import parted as parted
from .factory import stages as stages
from .normalized import Normalized as Normalized
from .zoo import MODELS as MODELS
