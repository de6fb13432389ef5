"""The package's version, read by the build and by records."""

__version__ = "0.1.0"
