"""Reports: read what runs recorded and show it. Nothing here imports torch."""
