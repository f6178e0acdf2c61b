"""Data types that are passed between the parts of the package."""
