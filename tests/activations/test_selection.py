import itertools

import pytest
import torch

from visae.activations.loaders import OrderedTokens, ShuffledTokens
from visae.activations.selection import select
from visae.activations.token_filter import TokenFilter
from visae.errors import ConfigError, StoreError

SITE = "residual@0"
N_IMAGES, GRID = 40, (3, 4)
N_TOKENS = 1 + 12


def numbered():
    image, token = torch.meshgrid(torch.arange(N_IMAGES), torch.arange(N_TOKENS), indexing="ij")
    return torch.stack([image, token], dim=2).float()


@pytest.fixture(scope="module")
def store(tmp_path_factory, store_of):
    """40 images of a class token and 3 x 4 patches; the labels repeat a, b, c, none."""
    return store_of(
        tmp_path_factory.mktemp("selection") / "store",
        {SITE: numbered(), "mlp@0": 5 * numbered()},
        special=("cls",),
        grid=GRID,
        tokens="all",
        labels=[("a", "b", "c", None)[i % 4] for i in range(N_IMAGES)],
        groups=[f"g{i // 10}" for i in range(N_IMAGES)],
        shard_bytes=1,
    )


def ordered(store, tokens="all", **conditions):
    """The (image, position) of every token that passes, as the activations say."""
    loader = OrderedTokens(
        store, SITE, tokens=tokens, where=TokenFilter(**conditions), images_per_batch=7
    )
    found = []
    for batch in loader:
        keys = batch.activations[SITE].int().tolist()
        assert keys == torch.stack([batch.images, batch.positions], dim=1).tolist()
        found += [tuple(key) for key in keys]
    return found


def product(images, positions=range(N_TOKENS)):
    return list(itertools.product(images, positions))


ALL = range(N_IMAGES)


@pytest.mark.parametrize(
    ("conditions", "wanted"),
    [
        ({}, product(ALL)),
        ({"labels": ("b",)}, product(range(1, 40, 4))),
        ({"labels": ("a", "c")}, product(range(0, 40, 2))),
        ({"groups": ("g1", "g3")}, product([*range(10, 20), *range(30, 40)])),
        ({"labels": ("a",), "groups": ("g0",)}, product([0, 4, 8])),
        ({"images": (7, 3, 3)}, product([3, 7])),
        ({"patch_rows": (0, 1)}, product(ALL, range(1, 5))),
        ({"patch_columns": (3, 9)}, product(ALL, [4, 8, 12])),
        ({"patch_rows": (1, 3), "patch_columns": (0, 2)}, product(ALL, [5, 6, 9, 10])),
        ({"labels": ("c",), "patch_rows": (2, 3)}, product(range(2, 40, 4), range(9, 13))),
    ],
)
def test_what_passes_is_what_was_asked_for(store, conditions, wanted):
    assert ordered(store, **conditions) == wanted


def test_a_region_of_recorded_patches_alone(store):
    assert ordered(store, "patches", patch_rows=(0, 1)) == product(ALL, range(1, 5))


@pytest.mark.parametrize("side", ["discovery", "confirmation"])
def test_a_side_is_that_of_the_images(store, side):
    rows = [i for i, found in enumerate(store.images.sides()) if found == side]
    assert 0 < len(rows) < N_IMAGES
    assert ordered(store, side=side) == product(rows)


@pytest.mark.parametrize(
    "conditions", [{"labels": ("b",)}, {"patch_rows": (1, 3)}, {"images": tuple(range(0, 30, 2))}]
)
def test_shuffled_tokens_come_once_a_pass(store, conditions):
    wanted = ordered(store, **conditions)
    some = ShuffledTokens(
        store,
        SITE,
        where=TokenFilter(**conditions),
        batch_size=len(wanted) // 5,
        buffer_bytes=len({image for image, _ in wanted}) * 13 * 8 * 9 // 10,
    )
    batches = list(itertools.islice(iter(some), 10))
    for half in (batches[:5], batches[5:]):
        assert sorted(tuple(k) for b in half for k in b.activations[SITE].tolist()) == wanted


# Patch labels


@pytest.fixture(scope="module")
def masked(store):
    """The store as if its images had masks: class 1 on a few patches, purity rising by column."""
    from visae.activations.store import ActivationStore, PatchLabels

    class Masked(ActivationStore):
        labels = torch.full((N_IMAGES, 12), 2, dtype=torch.int32)
        purity = torch.tensor([0.2, 0.4, 0.6, 0.8]).repeat(3).expand(N_IMAGES, 12).contiguous()

        def patch_labels(self, site):
            return PatchLabels({1: "bird", 2: "sky"}, self.labels, self.purity)

    found = Masked(store.folder)
    for image in range(0, N_IMAGES, 2):
        found.labels[image, : image % 12 + 1] = 1
    found.labels[3, 5] = -1
    return found


def with_label(masked, value, least_purity):
    passing = (masked.labels == value) & (masked.purity >= least_purity)
    return [(image, 1 + patch) for image, patch in passing.nonzero().tolist()]


@pytest.mark.parametrize(("name", "value"), [("bird", 1), ("sky", 2)])
@pytest.mark.parametrize("least_purity", [0.0, 0.5, 0.7])
@pytest.mark.parametrize("tokens", ["all", "patches"])
def test_patches_of_a_class_pass_where_they_are_pure(masked, name, value, least_purity, tokens):
    found = ordered(masked, tokens, patch_labels=(name,), least_purity=least_purity)
    assert found == with_label(masked, value, least_purity)


def test_patches_of_a_class_within_a_region_and_other_images(masked):
    found = ordered(
        masked, patch_labels=("bird", "sky"), patch_columns=(2, 4), labels=("d", "a")[1:]
    )
    wanted = [
        (image, 1 + patch)
        for image, patch in (masked.labels > 0).nonzero().tolist()
        if image % 4 == 0 and patch % 4 >= 2
    ]
    assert found == wanted


def test_uneven_images_are_shuffled_and_resumed(masked):
    where = TokenFilter(patch_labels=("bird",), least_purity=0)
    wanted = with_label(masked, 1, 0)
    assert len(wanted) == sum(image % 12 + 1 for image in range(0, 40, 2))

    def stream():
        return ShuffledTokens(
            masked, SITE, "mlp@0", where=where, batch_size=20, buffer_bytes=13 * 2 * 8 * 12
        )

    some = stream()
    endless = iter(some)
    batches = list(itertools.islice(endless, 4))
    state = some.state
    batches += itertools.islice(endless, 20)
    seen = [tuple(key) for batch in batches for key in batch.activations[SITE].tolist()]
    for n_pass in range(2):
        assert sorted(seen[n_pass * len(wanted) : (n_pass + 1) * len(wanted)]) == wanted
    for batch in batches:
        assert torch.equal(batch.activations["mlp@0"], 5 * batch.activations[SITE])
    again = stream()
    again.state = state
    for batch, same in zip(batches[4:], iter(again), strict=False):
        assert torch.equal(batch.activations[SITE], same.activations[SITE])


# As data of a training run


def test_the_normalisation_is_that_of_what_passes(masked):
    where = TokenFilter(patch_labels=("bird",), least_purity=0.5)
    stream = ShuffledTokens(masked, SITE, tokens="patches", where=where, batch_size=10)
    passing = torch.tensor(with_label(masked, 1, 0.5), dtype=torch.float64)
    found = stream.normalisation(SITE)
    torch.testing.assert_close(found.mean, passing.mean(0))
    assert found.scale == pytest.approx(float(passing.var(0, correction=0).mean().sqrt()))
    assert found.n_tokens == len(passing)


def test_reference_tokens_pass_too(masked):
    where = TokenFilter(patch_labels=("bird",), least_purity=0)
    reference = ShuffledTokens(masked, SITE, where=where, batch_size=10).reference()
    keys = [tuple(key) for key in reference.activations[SITE].int().tolist()]
    assert keys == [key for key in with_label(masked, 1, 0) if key[0] < 16]


def test_the_digest_knows_the_filter(store):
    def digest(**conditions):
        where = TokenFilter(**conditions)
        return ShuffledTokens(store, SITE, where=where, batch_size=5).digest

    assert digest() == digest(least_purity=0.7) == store.digest
    assert len({digest(), digest(labels=("a",)), digest(labels=("b",))}) == 3


# What cannot be asked for


@pytest.mark.parametrize(
    ("conditions", "said"),
    [
        ({"labels": ("aa",)}, "No image has the label aa.*Use one of: a"),
        ({"groups": ("g9",)}, "No image has the group g9.*g0"),
        ({"metadata": (("camera", "x"),)}, "no metadata column camera"),
        ({"labels": ("a",), "images": (1,)}, "No token passes the filter"),
        ({"images": ()}, "No token passes the filter"),
        ({"images": (40,)}, "no such image.*rows from 0 to 39"),
        ({"images": (-1,)}, "no such image"),
        ({"patch_rows": (3, 4)}, "No token passes the filter"),
        ({"patch_labels": ("bird",)}, "no patch labels"),
    ],
)
def test_what_is_not_there_is_refused(store, conditions, said):
    with pytest.raises(StoreError, match=said):
        select(store, SITE, tokens="all", where=TokenFilter(**conditions))


def test_a_region_has_no_special_tokens(store):
    with pytest.raises(StoreError, match="No token passes"):
        select(store, SITE, tokens="special", where=TokenFilter(patch_rows=(0, 1)))


def test_an_unknown_patch_class_is_named(masked):
    with pytest.raises(StoreError, match=r"No patch class is called brid.*bird"):
        select(masked, SITE, tokens="all", where=TokenFilter(patch_labels=("brid",)))


def test_less_than_a_batch_is_refused(store):
    with pytest.raises(StoreError, match="A batch of 14 tokens is more than the 13 tokens"):
        ShuffledTokens(store, SITE, where=TokenFilter(images=(2,)), batch_size=14)


def test_images_without_any_label_are_told_from_a_misspelt_one(tmp_path, store_of):
    bare = store_of(tmp_path / "bare", {SITE: numbered()}, special=("cls",), grid=GRID)
    with pytest.raises(StoreError, match="The images of this store have no labels"):
        ShuffledTokens(bare, SITE, where=TokenFilter(labels=("a",)), batch_size=14)


@pytest.mark.parametrize(
    ("conditions", "said"),
    [
        ({"least_purity": 1.5}, "least_purity is 1.5"),
        ({"least_purity": float("nan")}, "least_purity is nan"),
        ({"patch_rows": (2, 2)}, "patch_rows goes from 2 to 2"),
        ({"patch_columns": (-1, 2)}, "patch_columns goes from -1 to 2"),
    ],
)
def test_a_filter_that_makes_no_sense_is_refused(conditions, said):
    with pytest.raises(ConfigError, match=said):
        TokenFilter(**conditions)


# In order


def test_batches_in_order_have_whole_images(store):
    loader = OrderedTokens(store, SITE, "mlp@0", images_per_batch=16)
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    assert [len(batch.images) for batch in batches] == [16 * 13, 16 * 13, 8 * 13]
    found = torch.cat([batch.activations["mlp@0"] for batch in batches])
    assert torch.equal(found, 5 * numbered().flatten(0, 1))
    assert [torch.equal(a.images, b.images) for a, b in zip(batches, loader, strict=True)]
