"""Run a model over a split and score it."""
