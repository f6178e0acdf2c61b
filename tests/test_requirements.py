"""The pinned requirements: they follow pyproject.toml, carry hashes, and name no index."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CORE = PROJECT["project"]["dependencies"] + PROJECT["build-system"]["requires"]
SERVE = CORE + PROJECT["project"]["optional-dependencies"]["serve"]
DEV = CORE + PROJECT["project"]["optional-dependencies"]["dev"]


def pins(name: str) -> dict[str, list[str]]:
    """Package -> the versions pinned for one Python or another."""
    found: dict[str, list[str]] = {}
    for line in re.findall(r"^[a-z0-9].*", (ROOT / "requirements" / name).read_text(encoding="utf-8"), re.MULTILINE):
        requirement = Requirement(line.rstrip(" \\"))
        found.setdefault(canonicalize_name(requirement.name), []).append(str(requirement.specifier).removeprefix("=="))
    return found


@pytest.mark.parametrize(("name", "wanted"), [("core.txt", CORE), ("serve.txt", SERVE), ("dev.txt", DEV)])
def test_every_dependency_is_pinned_within_its_range(name, wanted):
    pinned = pins(name)
    for requirement in map(Requirement, wanted):
        versions = pinned.get(canonicalize_name(requirement.name), [])
        assert versions, f"{requirement.name} is in pyproject.toml but not in requirements/{name}. Run: make lock"
        assert all(requirement.specifier.contains(version) for version in versions), f"{requirement}: run make lock"


@pytest.mark.parametrize(("smaller", "larger"), [("core.txt", "serve.txt"), ("serve.txt", "dev.txt")])
def test_each_set_holds_the_smaller_one_unchanged(smaller, larger):
    small, large = pins(smaller), pins(larger)
    assert small == {package: large.get(package) for package in small}


@pytest.mark.parametrize("name", ["core.txt", "serve.txt", "dev.txt"])
def test_pins_have_hashes_and_name_no_index(name):
    text = (ROOT / "requirements" / name).read_text(encoding="utf-8")
    assert "://" not in text
    assert not re.search(r"^--", text, re.MULTILINE)
    assert len(re.findall(r"^[a-z0-9].*\\\n +--hash=sha256:", text, re.MULTILINE)) == sum(map(len, pins(name).values()))
