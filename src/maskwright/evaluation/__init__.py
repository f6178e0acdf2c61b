"""Running a model over a split, and scoring it."""
