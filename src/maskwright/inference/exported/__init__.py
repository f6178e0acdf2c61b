"""Exported files: their metadata, the runtimes that run them, and their results. Imports no torch: NumPy is enough."""
