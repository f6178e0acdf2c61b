"""`python -m benchmarks`: time maskwright against other implementations on the same input; one file per part."""

from typing import Literal

PartName = Literal[
    "prediction",
    "training",
    "eomt",
    "postprocessing",
    "data",
    "evaluation",
    "loading",
    "startup",
    "serving",
    "export",
    "accuracy",
    "ablation",
    "load",
    "ray",
]
ON_CAMVID = ("accuracy", "ablation")  # they train on it, which takes hours
ON_REQUEST = (*ON_CAMVID, "load", "ray")
