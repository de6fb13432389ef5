"""Build the models of the distillation literature by their usual names, and models of other libraries.

A family is one file with a dict ``NETS``, name -> (classes, channels) -> module; adding a file is enough. The feature
modules are ``stem``, ``stage1``, ``stage2``, ..., and ``pool``, whose output is the input of the head.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
