"""Run many experiments described by text: comparisons and hyperparameter searches."""
