"""Diagnostics of a machine and of training runs."""
