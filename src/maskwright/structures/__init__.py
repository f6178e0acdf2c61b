"""The data that flows through the package."""
