"""`python -m benchmarks`: ours against its peers on the same input, in turns; one file per part."""

from typing import Literal

PartName = Literal["prediction", "training", "postprocessing", "data", "evaluation", "loading", "startup", "accuracy"]
