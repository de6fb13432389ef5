"""Data sets as batches of tensors; what reads files imports its libraries only when it reads."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
