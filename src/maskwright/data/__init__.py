"""Datasets: reading, augmenting, batching and checking them."""
