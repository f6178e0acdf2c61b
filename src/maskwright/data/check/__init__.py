"""The dataset doctor: `maskwright check`."""
