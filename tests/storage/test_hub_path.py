from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visae.errors import CheckpointError, ConfigError
from visae.storage.hub_path import HubPath, is_hub_path

STEPS = st.text("aZ09._-", min_size=1, max_size=8).filter(lambda text: text.strip(".") != "")
NAMES = st.text("aZ09", min_size=1, max_size=8)
REVISIONS = st.none() | st.sampled_from(["main", "v1.0", "refs/pr/3", "a" * 40])


@given(st.tuples(NAMES, NAMES), st.lists(STEPS, max_size=3), REVISIONS)
def test_a_place_is_read_as_it_is_written(repository, folder, revision):
    place = HubPath(repository="/".join(repository), folder="/".join(folder), revision=revision)
    assert HubPath.parse(str(place)) == place
    assert HubPath.parse(Path(str(place))) == place


def test_a_place_is_taken_apart():
    place = HubPath.parse("hf://ada/saes/vit/first@v1.0")
    assert (place.repository, place.folder, place.revision) == ("ada/saes", "vit/first", "v1.0")
    assert (place.name, place.file("sae.json")) == ("first", "vit/first/sae.json")
    whole = HubPath.parse("hf://ada/saes")
    assert (whole.name, whole.file("sae.json")) == ("saes", "sae.json")


@pytest.mark.parametrize(
    "text",
    [
        "hf://",
        "hf://ada",
        "hf://ada/",
        "hf:///ada/saes",
        "hf://ada//saes",
        "hf://ada/saes/",
        "hf://ada/saes//first",
        "hf://ada/saes/../other",
        "hf://ada/saes/.",
        "hf://ada/saes/*",
        "hf://ada/saes/[a]",
        "hf://ada/saes/a b",
        "hf://ada/sa--es",
        "hf://ada/saes.git",
        "hf://-ada/saes",
        "hf://ada/saes@",
        "hf://ada/saes@a@b",
        "hf://ada/saes@../x",
        "hf://ada/saes@/x",
        "hf://ada/saes?revision=main",
        "hf://ada/" + "s" * 100,
        "ada/saes",
        "hf://ada/saes\n",
        "hf://adä/saes",
    ],
)
def test_another_form_is_refused(text):
    with pytest.raises(ConfigError, match=r"(?s)no place on the model hub.*Write hf://owner"):
        HubPath.parse(text)


def test_the_error_is_of_the_type_asked_for():
    with pytest.raises(CheckpointError):
        HubPath.parse("hf://ada", error=CheckpointError)


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("hf://ada/saes", True),
        (Path("hf://ada/saes"), True),
        ("hf:saes", False),
        ("saes/hf:/x", False),
        (Path("saes"), False),
    ],
)
def test_what_is_meant_for_the_hub(location, expected):
    assert is_hub_path(location) == expected
