"""Folders and archives."""
