"""One run: its configuration, trainer, checkpoints and records."""
