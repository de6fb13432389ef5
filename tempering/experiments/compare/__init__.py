"""The command `tempering compare`: a grid of methods and seeds."""
