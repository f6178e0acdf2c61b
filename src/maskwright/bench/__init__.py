"""`maskwright bench`: ours against its peers on the same input, in turns; one file per part."""
