"""Losses on intermediate features."""
