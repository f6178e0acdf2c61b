"""Readers of weight files, which never run anything that a file contains."""
