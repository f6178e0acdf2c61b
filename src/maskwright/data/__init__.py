"""Data sets: reading, augmenting, batching and checking them."""
