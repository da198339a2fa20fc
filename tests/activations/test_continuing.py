"""A recording goes on only with the list of images that it began with."""

import dataclasses

import pytest

from visae.activations.continuing import hash_of_images
from visae.activations.store import ActivationStore
from visae.errors import StoreError
from visae.images.source import ImageEntry


@pytest.fixture
def listed(numbered_images):
    """50 images, listed in another order or described in other words."""

    def make(*, order=None, change=None, is_stream=False):
        source = numbered_images(50, labels=["a"] * 50, unreadable={3})
        entries = [
            dataclasses.replace(entry, metadata={"site": "x", "year": None})
            for entry in source.entries
        ]
        for row, words in (change or {}).items():
            entries[row] = dataclasses.replace(entries[row], **words)
        source.entries = tuple(entries[row] for row in order or range(50))
        source.is_stream = is_stream
        return source

    return make


@pytest.fixture
def begun(run, listed, tmp_path, stop_after):
    """A recording interrupted after its first shards."""
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "s", source=listed(), options=stop_after(40))
    return tmp_path / "s"


def test_the_same_list_goes_on(run, listed, begun):
    assert run(begun, source=listed()).n_images == 49


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ([*range(1, 50), 0], "where image 1 is listed now, another was recorded"),
        ([1, 0, *range(2, 50)], "where image 1 is listed now, another was recorded"),
        ([*range(15), 49, *range(16, 49), 15], "where image 49 is listed now"),
    ],
)
def test_a_list_in_another_order_is_refused(run, listed, begun, order, said):
    with pytest.raises(StoreError, match=said):
        run(begun, source=listed(order=order))
    with pytest.raises(StoreError, match="incomplete"):
        ActivationStore(begun)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"label": "b"}, "the label of image 5 was 'a' and is 'b' now"),
        ({"label": None}, "the label of image 5 was 'a' and is None now"),
        ({"group": "g"}, "the group of image 5 was None and is 'g' now"),
        ({"metadata": {"site": "y"}}, "the site of image 5 was 'x' and is 'y' now"),
        ({"ref": "b"}, "where image b is listed now, another was recorded"),
        ({"metadata": {"site": "x", "year": "1"}}, "the year of image 5 was None and is '1' now"),
        ({"metadata": {"site": "x", "age": "2"}}, "the age of image 5 was None and is '2' now"),
    ],
)
def test_other_words_about_a_recorded_image_are_refused(run, listed, begun, words, said):
    with pytest.raises(StoreError, match=f"list of images has changed.*{said}.*Restore the list"):
        run(begun, source=listed(change={5: words}))


def test_a_complete_store_is_held_against_the_list_too(run, listed, tmp_path):
    run(tmp_path / "s", source=listed())
    with pytest.raises(StoreError, match="the label of image 49 was 'a' and is 'b' now"):
        run(tmp_path / "s", source=listed(change={49: {"label": "b"}}))


def test_a_stream_learns_labels_only_as_it_is_read(run, listed, begun):
    changed = {5: {"label": None, "metadata": {}}}
    assert run(begun, source=listed(change=changed, is_stream=True)).images.labels[5] == "a"
    with pytest.raises(StoreError, match="another was recorded"):
        run(begun, source=listed(order=[*range(1, 50), 0], is_stream=True))


@pytest.mark.parametrize("words", [{"ref": "b"}, {"label": "b"}, {"group": "b"}])
def test_lists_are_told_apart_by_hash(words):
    entry = ImageEntry(ref="a", metadata={"site": "x"})
    other = dataclasses.replace(entry, **words)
    again = ImageEntry(ref="a", metadata={"site": "x"})
    assert hash_of_images([entry]) == hash_of_images([again]) != hash_of_images([other])
    assert hash_of_images([entry, other]) != hash_of_images([other, entry])
    assert hash_of_images([entry]) != hash_of_images([ImageEntry(ref="a", metadata={})])
