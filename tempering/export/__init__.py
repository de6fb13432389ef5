"""Take the trained student away: load it, convert it, quantize it, and write a folder for the Hugging Face Hub."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
