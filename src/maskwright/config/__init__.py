"""Recipes: their schema, how they are read, and lists of categories."""
