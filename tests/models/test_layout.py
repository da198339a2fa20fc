import pytest

from visae.errors import ModelError
from visae.models.layout import Layout

LAYOUT = Layout(special=("cls", "register0"), grid=(2, 3))
PATCHES = Layout(special=(), grid=(2, 3))
NAMES = ["cls", "register0", "p0", "p1", "p2", "p3", "p4", "p5"]


@pytest.mark.parametrize(
    ("policy", "kept"), [("all", NAMES), ("patches", NAMES[2:]), ("special", NAMES[:2])]
)
def test_a_policy_keeps_its_tokens(policy, kept):
    assert NAMES[LAYOUT.kept(policy)] == kept
    assert LAYOUT.n_kept(policy) == len(kept)


def test_counts():
    assert (LAYOUT.n_special, LAYOUT.n_patches, LAYOUT.n_tokens) == (2, 6, 8)
    assert (PATCHES.n_special, PATCHES.n_patches, PATCHES.n_tokens) == (0, 6, 6)


def test_special_tokens_are_refused_where_there_are_none():
    with pytest.raises(ModelError, match=r"no special tokens.*Keep patches"):
        PATCHES.kept("special")


@pytest.mark.parametrize("stored", ["all", "patches", "special"])
@pytest.mark.parametrize("wanted", ["all", "patches", "special"])
def test_tokens_are_found_among_those_stored(wanted, stored):
    if stored in ("all", wanted):
        among = NAMES[LAYOUT.kept(stored)]
        assert among[LAYOUT.within(wanted, stored)] == NAMES[LAYOUT.kept(wanted)]
    else:
        with pytest.raises(ModelError, match=f"{wanted} tokens were not recorded"):
            LAYOUT.within(wanted, stored)


def test_special_tokens_have_names():
    assert LAYOUT.special_index("register0") == 1
    with pytest.raises(ModelError, match=r"no register1 token \(special tokens: cls, register0\)"):
        LAYOUT.special_index("register1")
    with pytest.raises(ModelError, match="special tokens: none"):
        PATCHES.special_index("cls")
