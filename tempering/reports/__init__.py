"""Reports built from the records of runs. This package does not import torch."""
