"""The command `tempering tune`: hyperparameter search."""
