import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visae.errors import ConfigError
from visae.images.splits import split_of, split_sides

salts = st.text(max_size=5)
shares = st.floats(0.01, 0.99)
# Distinct contents, some in one of a few groups.
images = st.lists(
    st.tuples(st.text(), st.none() | st.sampled_from(["p1", "p2", "p3"])),
    unique_by=lambda image: image[0],
    max_size=30,
)


def sides(found, **options):
    contents, groups = zip(*found, strict=True) if found else ((), ())
    return split_sides(contents, groups, **options)


@given(found=images, share=shares, salt=salts, data=st.data())
def test_sides_do_not_depend_on_order_or_on_images_added(found, share, salt, data):
    options = {"confirmation_share": share, "salt": salt}
    known = dict(zip(found, sides(found, **options), strict=True))
    some = data.draw(st.permutations(found))[: len(found) // 2]
    assert sides(some, **options) == [known[image] for image in some]


@given(found=images, share=shares, salt=salts)
def test_a_group_never_straddles_the_split(found, share, salt):
    side_of_group = {}
    for (_, group), side in zip(
        found, sides(found, confirmation_share=share, salt=salt), strict=True
    ):
        if group is not None:
            assert side_of_group.setdefault(group, side) == side


@given(key=st.text(), share=shares, larger=shares, salt=salts)
def test_a_larger_share_only_adds_images_to_confirmation(key, share, larger, salt):
    small, large = sorted((share, larger))
    if split_of(key, confirmation_share=small, salt=salt) == "confirmation":
        assert split_of(key, confirmation_share=large, salt=salt) == "confirmation"


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("salt", ["visae", "other", ""])
@pytest.mark.parametrize("grouped", [False, True], ids=["images", "groups"])
def test_the_share_is_near_the_one_asked_for(share, salt, grouped):
    names = [f"{i}" for i in range(4000)]
    groups = names if grouped else [None] * len(names)
    found = split_sides(names, groups, confirmation_share=share, salt=salt)
    deviation = (share * (1 - share) / len(names)) ** 0.5
    assert abs(found.count("confirmation") / len(names) - share) < 4 * deviation


def test_salts_give_independent_divisions():
    names = [f"{i}" for i in range(4000)]
    first, second = (split_sides(names, [None] * 4000, salt=salt) for salt in ("a", "b"))
    agreement = sum(a == b for a, b in zip(first, second, strict=True)) / len(names)
    assert abs(agreement - 0.5) < 4 * 0.5 / 4000**0.5


def test_the_side_is_the_first_64_bits_of_a_hash():
    digest = hashlib.sha256(b"visae:abc").digest()
    fraction = int.from_bytes(digest[:8], "big") / 2**64
    assert split_of("abc", confirmation_share=fraction * 0.999) == "discovery"
    assert split_of("abc", confirmation_share=fraction * 1.001) == "confirmation"


def test_a_group_and_an_image_of_the_same_name_are_independent():
    names = [f"{i}" for i in range(200)]
    assert split_sides(names, [None] * 200) != split_sides(names, names)


def names_on(side):
    return next(f"p{i}" for i in range(99) if split_of(f"group:p{i}") == side)


def test_equal_images_in_groups_on_different_sides_are_refused():
    groups = [names_on("discovery"), names_on("confirmation")]
    with pytest.raises(ConfigError, match=r"content same, group p\d+"):
        split_sides(["same", "same"], groups)
    assert split_sides(["same", "same"], groups[:1] * 2) == ["discovery"] * 2


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_share_that_leaves_a_side_empty_is_refused(share):
    with pytest.raises(ConfigError, match="Give a share above 0 and below 1"):
        split_sides(["a"], [None], confirmation_share=share)
