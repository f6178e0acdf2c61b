"""Names of weights in other implementations: one table each, read in both directions."""
