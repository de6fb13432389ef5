"""The networks that this field's tables are made of, by the field's names, and classifiers of other libraries.

A family is one file with a dict ``NETS``, name -> (classes, channels) -> module; nothing else is edited. Stages are the
modules ``stem``, ``stage1``, ``stage2``, ..., and what the head sees is ``pool``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
