"""Operators that several models share."""
