"""The result for one image, and what it becomes."""
