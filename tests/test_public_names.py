"""The package's face: every public name is there, and comes from where it says."""

import importlib

import pytest

import visae


@pytest.mark.parametrize("name", sorted(set(visae.__all__) - {"__version__"}))
def test_every_public_name_is_loaded_when_used(name: str) -> None:
    value = getattr(visae, name)
    home = importlib.import_module(f"visae.{visae._HOMES[name]}")
    assert value is getattr(home, name)


def test_the_names_are_complete() -> None:
    assert set(visae.__all__) == set(visae._HOMES) | {"__version__"}
    assert set(visae.__all__) <= set(dir(visae))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'recrod'"):
        visae.recrod  # noqa: B018
