"""Losses for object detectors."""
