"""Teachers behind an HTTP endpoint."""
