"""Methods that control the whole training step."""
