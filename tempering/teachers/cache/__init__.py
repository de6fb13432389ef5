"""Teacher outputs stored on disk."""
