"""The pins: every package by hash, from any mirror, the demo's the same as development's."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FILES = ("uv", "demo", "dev", "backbone")
REQUIREMENT = re.compile(r"^([a-z0-9-]+)==([^\s;]+)( ; [^\\]+)? \\$")
HASH = re.compile(r"^    --hash=sha256:[0-9a-f]{64}( \\)?$")


def lines(name: str) -> list[str]:
    """The lines of a requirements file that are not comments."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if not line.lstrip().startswith("#")]


def pins(name: str) -> set[tuple[str, str]]:
    """Names and versions."""
    matches = (REQUIREMENT.match(line) for line in lines(name))
    return {(match[1], match[2]) for match in matches if match}


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w-]", text)[0].lower().replace("_", "-") for text in requirements}


@pytest.mark.parametrize("name", FILES)
def test_every_pin_has_hashes_and_nothing_names_a_place(name):
    found = lines(name)
    assert found
    for line, following in zip(found, [*found[1:], ""], strict=True):
        assert REQUIREMENT.match(line) or HASH.match(line), line
        if REQUIREMENT.match(line) or line.endswith("\\"):
            assert HASH.match(following), f"{line} has no hash"


def test_the_demo_uses_what_the_tests_test():
    assert pins("demo") <= pins("dev")


@pytest.mark.parametrize(("name", "extras"), [("demo", ["demo"]), ("dev", ["demo", "dev"])])
def test_pins_are_made_from_the_project(name, extras):
    project = PROJECT["project"]
    wanted = [*project["dependencies"], *PROJECT["dependency-groups"]["install"]]
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    missing = names(wanted) - {pinned for pinned, _ in pins(name)}
    assert not missing, "run: make lock"


def test_the_build_backend_is_pinned():
    assert PROJECT["dependency-groups"]["install"] == PROJECT["build-system"]["requires"]
