from .factory import build as build
from .factory import build_seeded as build_seeded
from .factory import load as load
from .factory import network_facts as network_facts
from .factory import parted as parted
from .factory import stages as stages
from .normalized import Normalized as Normalized
from .zoo import MODELS as MODELS
