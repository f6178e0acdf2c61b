"""Results in the formats of annotation tools, one file per tool."""
