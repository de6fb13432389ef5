"""Teachers: sources of the teacher's outputs, live, cached or remote."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
