"""Operators without parameters, and their CPU-optimized forms."""
