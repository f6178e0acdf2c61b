"""Key maps: the names of weights in other implementations, one file each, read in both directions."""
