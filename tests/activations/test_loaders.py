import collections
import dataclasses
import itertools
import math
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visae.activations.loaders import ShuffledTokens
from visae.activations.mixing_buffer import LoaderState, default_buffer_bytes
from visae.activations.stream import TokenStream
from visae.errors import ModelError, StoreError

N_IMAGES, N_TOKENS = 50, 6
SITE = "residual@0"
EVERY = sorted(itertools.product(range(N_IMAGES), range(N_TOKENS)))


def numbered(n_images, n_tokens):
    """Activations that say which token they are: (image, token)."""
    image, token = torch.meshgrid(torch.arange(n_images), torch.arange(n_tokens), indexing="ij")
    return torch.stack([image, token], dim=2).float()


@pytest.fixture(scope="module")
def store(tmp_path_factory, store_of):
    """50 images of 6 tokens (one special) in four shards, at two sites."""
    table = numbered(N_IMAGES, N_TOKENS)
    return store_of(
        tmp_path_factory.mktemp("loaders") / "store",
        {SITE: table, "mlp@1": torch.cat([table, 100 + table], dim=2)},
        special=("cls",),
        tokens="all",
        shard_bytes=1,
    )


def loader(store, batch_size=20, n_buffer_images=10**6, **options):
    """A loader whose buffer holds so many images in its two halves together."""
    image_bytes = N_TOKENS * 2 * 4
    buffer_bytes = n_buffer_images * image_bytes
    return ShuffledTokens(store, SITE, batch_size=batch_size, buffer_bytes=buffer_bytes, **options)


def take(batches, n):
    return list(itertools.islice(iter(batches), n))


def keys(batch, site=SITE):
    return [tuple(row) for row in batch.activations[site][:, :2].int().tolist()]


def drawn(some_loader, n_tokens):
    """The first tokens of a stream."""
    n_batches = -(-n_tokens // some_loader.batch_size)
    seen = [key for batch in take(some_loader, n_batches) for key in keys(batch)]
    return seen[:n_tokens]


def equal(first, second):
    return all(
        torch.equal(a.activations[site], b.activations[site])
        and torch.equal(a.images, b.images)
        and torch.equal(a.positions, b.positions)
        for a, b in zip(first, second, strict=True)
        for site in a.activations
    )


LOADERS = {
    "batch_size": st.sampled_from([7, 20, 48, 60]),
    "n_buffer_images": st.sampled_from([20, 21, 33, 49, 50, 60]),
    "seed": st.integers(-3, 2**40),
}


# Each token once a pass


@given(**LOADERS)
@settings(max_examples=12)
def test_each_token_comes_once_a_pass(store, batch_size, n_buffer_images, seed):
    some = loader(store, batch_size, n_buffer_images, seed=seed)
    seen = drawn(some, 3 * len(EVERY))
    for n_pass in range(3):
        assert sorted(seen[n_pass * len(EVERY) : (n_pass + 1) * len(EVERY)]) == EVERY


@pytest.mark.parametrize("n_buffer_images", [20, 60])
def test_batches_are_full_and_run_on_into_the_next_pass(store, n_buffer_images):
    some = loader(store, 56, n_buffer_images)
    batches = take(some, 6)
    assert {batch.activations[SITE].shape for batch in batches} == {(56, 2)}
    assert (some.state.n_pass, some.state.n_tokens) == (1, 6 * 56 - len(EVERY))


def test_a_batch_says_which_tokens_it_has(store):
    for batch in take(loader(store, 56, 20), 12):
        assert keys(batch) == list(
            zip(batch.images.tolist(), batch.positions.tolist(), strict=True)
        )


@pytest.mark.parametrize(("tokens", "wanted"), [("patches", range(1, 6)), ("special", range(1))])
def test_a_choice_of_tokens_is_loaded_alone(store, tokens, wanted):
    some = loader(store, 10, tokens=tokens)
    seen = drawn(some, N_IMAGES * len(wanted))
    assert sorted(seen) == sorted(itertools.product(range(N_IMAGES), wanted))
    (batch,) = take(some, 1)
    assert set(batch.positions.tolist()) <= set(wanted)


def test_several_sites_have_the_same_tokens(store):
    some = ShuffledTokens(store, SITE, "mlp@1", batch_size=30, buffer_bytes=20 * 6 * 6 * 4)
    for batch in take(some, 20):
        assert keys(batch) == keys(batch, "mlp@1")
        assert torch.equal(batch.activations["mlp@1"][:, 2:], batch.activations[SITE] + 100)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_batches_have_the_store_s_number_format(tmp_path, store_of, dtype):
    table = numbered(20, 3)
    made = store_of(tmp_path / "s", {SITE: table}, dtype=dtype)
    (batch,) = take(ShuffledTokens(made, SITE, batch_size=60), 1)
    assert batch.activations[SITE].dtype == getattr(torch, dtype)
    assert sorted(keys(batch)) == sorted(itertools.product(range(20), range(3)))


def test_a_store_with_empty_shards_is_loaded(tmp_path, numbered_images, table_model):
    from visae.activations.format import RecordConfig
    from visae.activations.record import record
    from visae.models.config import ModelConfig

    made = record(
        numbered_images(N_IMAGES, unreadable=range(16, 32)),
        table_model({SITE: numbered(N_IMAGES, N_TOKENS)}),
        tmp_path / "s",
        config=RecordConfig(sites=(SITE,), dtype="float32", shard_bytes=1),
        model_config=ModelConfig(model="test/table"),
    )
    assert made.n_images_in_shard(1) == 0
    images = {image for image, _ in drawn(loader(made, 4), 34 * 6)}
    assert images == set(range(N_IMAGES)) - set(range(16, 32))


def test_the_default_buffer_has_an_image_in_each_half_for_each_token_of_a_batch():
    of_vit_b = 197 * 768 * 2
    assert default_buffer_bytes(4096, of_vit_b) // 2 // of_vit_b == 4096
    assert default_buffer_bytes(16, of_vit_b) == 2**30
    assert default_buffer_bytes(2**20, of_vit_b) == 2**32


def test_a_loader_without_a_buffer_size_gives_the_order_of_the_default_one(store):
    default = ShuffledTokens(store, SITE, batch_size=20)
    given = ShuffledTokens(store, SITE, batch_size=20, buffer_bytes=2**30)
    assert drawn(default, 200) == drawn(given, 200)


# The order


@given(**LOADERS, n_done=st.integers(0, 60))
@settings(max_examples=12)
def test_any_state_gives_the_same_remaining_batches(
    store, batch_size, n_buffer_images, seed, n_done
):
    first = loader(store, batch_size, n_buffer_images, seed=seed)
    batches = iter(first)
    take(batches, n_done)
    state = first.state
    rest = take(batches, 25)
    second = loader(store, batch_size, n_buffer_images, seed=seed)
    second.state = dataclasses.replace(state)
    assert equal(rest, take(second, 25))


def test_a_stream_is_taken_up_where_it_was_left_or_set_back(store):
    some = loader(store, 20, 20)
    first = take(some, 9)
    rest = take(some, 9)
    some.state = LoaderState()
    assert equal(take(some, 18), first + rest)


@pytest.mark.parametrize("n_threads", [2, 5])
def test_the_order_does_not_depend_on_threads(store, n_threads):
    first, second = (loader(store, 30, 20, n_threads=n) for n in (1, n_threads))
    assert equal(take(first, 40), take(second, 40))


def test_another_seed_and_another_pass_give_another_order(store):
    orders = [drawn(loader(store, 100, seed=seed), 300) for seed in (0, 1, -1)]
    later = loader(store, 100)
    later.state = LoaderState(n_pass=1)
    orders.append(drawn(later, 300))
    assert all(a != b for a, b in itertools.combinations(orders, 2))


def entropy(values):
    counts = torch.tensor(list(collections.Counter(values).values()), dtype=torch.float64)
    shares = counts / counts.sum()
    return float(-(shares * shares.log()).sum())


@pytest.mark.parametrize("batch_size", [15, 40, 100, 130])
def test_a_batch_mixes_images_and_positions_as_uniform_draws_do(tmp_path, store_of, batch_size):
    """From the first batch on; of 100 images, a half of the smaller buffer holds 34."""
    made = store_of(tmp_path / "s", {SITE: numbered(100, 60)}, shard_bytes=1)
    some = ShuffledTokens(made, SITE, batch_size=batch_size, buffer_bytes=100 * 60 * 2 * 4)
    half = ShuffledTokens(made, SITE, batch_size=batch_size, buffer_bytes=99 * 60 * 2 * 4)
    generator = np.random.default_rng(0)
    uniform = generator.integers(0, [100, 60], size=(200, batch_size, 2))
    expected = [np.mean([entropy(row) for row in uniform[..., i].tolist()]) for i in (0, 1)]
    for batch in take(some, 40):
        assert entropy(batch.images.tolist()) >= 0.99 * expected[0]
    if batch_size <= 17:  # half of the images in half the buffer
        for batch in take(half, 40):
            assert entropy(batch.images.tolist()) >= 0.99 * expected[0]
    found = [entropy(batch.positions.tolist()) for batch in take(some, 150)]
    assert np.mean(found) >= 0.99 * expected[1]
    assert min(found) >= 0.85 * expected[1]


def test_tokens_fall_evenly_into_the_batches(store):
    """Over many passes each token is in the first batch as often as any other."""
    counts = collections.Counter()
    n_passes, some = 200, loader(store, 60)
    for n_pass in range(n_passes):
        some.state = LoaderState(n_pass=n_pass)
        counts.update(keys(take(some, 1)[0]))
    expected = n_passes * 60 / len(EVERY)
    chi_square = sum((counts[k] - expected) ** 2 / (expected * 0.8) for k in counts)
    assert len(counts) == len(EVERY)
    assert 180 < chi_square < 400  # 250 to 300 degrees of freedom: ± 4 standard deviations


def test_small_buffers_change_from_pass_to_pass(store):
    def images_of_first_batch(n_pass):
        some = loader(store, 20, n_buffer_images=20)
        some.state = LoaderState(n_pass=n_pass)
        return frozenset(take(some, 1)[0].images.tolist())

    assert len({images_of_first_batch(n) for n in range(5)}) == 5


# Memory and reading


@pytest.mark.parametrize("n_buffer_images", [20, 33, 49, 50, 400])
def test_the_buffer_holds_no_more_than_asked_for(store, n_buffer_images):
    some = loader(store, 20, n_buffer_images)
    take(some, 40)
    held = sum(t.nbytes for half in some._mixed._memory for t in half.values())
    assert held <= min(n_buffer_images, N_IMAGES) * N_TOKENS * 2 * 4
    assert held > 0.6 * min(n_buffer_images, N_IMAGES) * N_TOKENS * 2 * 4


def count_fills(some, monkeypatch):
    counted, fill = [], some._filler.fill

    def counting(images, into, stop):
        counted.append(len(images))
        return fill(images, into, stop)

    monkeypatch.setattr(some._filler, "fill", counting)
    return counted


def test_a_store_that_fits_is_read_once(store, monkeypatch):
    some = loader(store, 60, n_buffer_images=50)
    counted = count_fills(some, monkeypatch)
    take(some, 20)
    take(some, 20)
    assert counted == [50]


def test_what_the_buffer_holds_already_is_not_read_again(store, monkeypatch):
    some = loader(store, 60, n_buffer_images=26)
    counted = count_fills(some, monkeypatch)
    take(some, 1)
    some.state = LoaderState()
    take(some, 1)
    assert counted in ([12], [12, 13])  # the second half may not have been begun


def test_no_thread_is_left_behind(store):
    take(loader(store, 20, 20), 3)
    assert not [t.name for t in threading.enumerate() if t.name.startswith("visae-mixing")]


# Errors


@pytest.mark.parametrize(
    ("batch_size", "n_buffer_images", "said"),
    [
        (301, 60, "more than the 300 tokens there are"),
        (61, 20, "more than the 60 tokens that half the mixing buffer holds.*a buffer of 1 MiB"),
        (1, 1, "more than the 0 tokens that half the mixing buffer holds"),
    ],
)
def test_too_few_tokens_for_a_batch_are_refused(store, batch_size, n_buffer_images, said):
    with pytest.raises(StoreError, match=f"A batch of {batch_size} tokens is {said}"):
        loader(store, batch_size, n_buffer_images)


def test_a_site_that_was_not_recorded_is_refused(store):
    with pytest.raises(StoreError, match=r"no site residual@7.*residual@0"):
        ShuffledTokens(store, "residual@7", batch_size=5)


def test_a_stream_of_no_site_is_refused(store):
    with pytest.raises(StoreError, match="No site is named"):
        ShuffledTokens(store, batch_size=5)


def test_sites_of_different_layouts_are_refused(tmp_path, store_of):
    tables = {SITE: numbered(20, 6), "mlp@0": numbered(20, 4)}
    made = store_of(tmp_path / "s", tables)
    with pytest.raises(StoreError, match="2 different layouts"):
        ShuffledTokens(made, *tables, batch_size=5)


def test_tokens_that_were_not_recorded_are_refused(tmp_path, store_of):
    made = store_of(tmp_path / "s", {SITE: numbered(20, 6)}, special=("cls",), tokens="patches")
    with pytest.raises(ModelError, match="were not recorded"):
        ShuffledTokens(made, SITE, tokens="all", batch_size=5)


def test_a_file_that_vanishes_on_the_way_is_named(tmp_path, store_of):
    made = store_of(tmp_path / "s", {SITE: numbered(50, 6)}, shard_bytes=1)
    some = loader(made, 20, 20)
    (made.folder / SITE / "00001.safetensors").unlink()
    with pytest.raises(StoreError, match=r"cannot be opened: No such file.*00001"):
        take(some, 30)


# As a stream to train on


def test_it_is_a_stream(store):
    some = loader(store, tokens="patches")
    assert isinstance(some, TokenStream)
    assert some.sites == (SITE,)
    assert (some.d_model(SITE), some.layout(SITE)) == (2, store.site(SITE).layout)
    assert (some.model, some.digest, some.images) == (store.identity, store.digest, None)
    assert some.preprocessing == store.preprocessing


def test_the_normalisation_is_that_of_its_tokens(store):
    found = loader(store, tokens="patches").normalisation(SITE)
    patches = numbered(N_IMAGES, N_TOKENS)[:, 1:].flatten(0, 1).double()
    torch.testing.assert_close(found.mean, patches.mean(0))
    assert found.scale == pytest.approx(math.sqrt(patches.var(0, correction=0).mean()))
    assert found.n_tokens == 250


def test_the_reference_is_some_tokens_of_the_first_images(store):
    batch = loader(store, tokens="patches").reference()
    assert keys(batch) == list(itertools.product(range(8), range(1, 6)))
