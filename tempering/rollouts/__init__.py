"""Text that models generate: on-policy, speculative and sequence-level batches, decoding, sampling, scoring."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
