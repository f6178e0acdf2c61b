"""Weights: our file format, and those of other implementations."""
