"""`python -m benchmarks`: time maskwright against other implementations on the same input; one file per part."""

from typing import Literal

PartName = Literal[
    "prediction",
    "training",
    "postprocessing",
    "data",
    "evaluation",
    "loading",
    "startup",
    "accuracy",
    "ablation",
]
ON_REQUEST = ("accuracy", "ablation")  # they train on CamVid, which takes hours
