"""Many runs, described by text."""
