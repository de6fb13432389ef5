"""The package's version, read by the build and written to records."""

__version__ = "0.2.0"
