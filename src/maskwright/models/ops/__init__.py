"""Operators without parameters, and their CPU-optimised forms."""
