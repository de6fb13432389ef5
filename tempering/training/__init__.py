"""Train a student: configuration, trainer, checkpoints and records of a run."""
