import collections
import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visae.activations.loaders import LoaderState, ShuffledTokens
from visae.errors import StoreError

N_IMAGES, N_TOKENS = 50, 6


def numbered(n_images, n_tokens):
    """Activations that say which token they are: (image, token)."""
    image, token = torch.meshgrid(torch.arange(n_images), torch.arange(n_tokens), indexing="ij")
    return torch.stack([image, token], dim=2).float()


@pytest.fixture(scope="module")
def store(tmp_path_factory, store_of):
    """50 images of 6 tokens (one special) in four shards."""
    return store_of(
        tmp_path_factory.mktemp("loaders") / "store",
        {"residual@0": numbered(N_IMAGES, N_TOKENS)},
        special=("cls",),
        tokens="all",
        shard_bytes=1,
    )


def loader(store, batch_size=20, n_buffer_images=10**6, **options):
    image_bytes = N_TOKENS * 2 * 4
    return ShuffledTokens(
        store,
        "residual@0",
        batch_size=batch_size,
        buffer_bytes=n_buffer_images * image_bytes,
        **options,
    )


def take(batches, n):
    return list(itertools.islice(iter(batches), n))


def keys(batch):
    return [tuple(row) for row in batch.int().tolist()]


def one_pass(some_loader):
    """The batches of the first pass."""
    batches = []
    for batch in some_loader:
        if some_loader.state.n_pass > 0:
            return batches
        batches.append(batch)
    return batches


LOADERS = {
    "batch_size": st.integers(1, 60),
    "n_buffer_images": st.integers(10, 60),
    "seed": st.integers(-3, 2**40),
}


@given(**LOADERS)
@settings(max_examples=40)
def test_each_token_comes_at_most_once_a_pass(store, batch_size, n_buffer_images, seed):
    batches = one_pass(loader(store, batch_size, n_buffer_images, seed=seed))
    seen = [key for batch in batches for key in keys(batch)]
    assert all(batch.shape == (batch_size, 2) for batch in batches)
    assert len(seen) == len(set(seen))
    assert set(seen) <= set(itertools.product(range(N_IMAGES), range(N_TOKENS)))
    assert batches


@pytest.mark.parametrize("batch_size", [1, 20, 60, 100, 300])
def test_each_token_comes_once_when_batches_divide_the_store(store, batch_size):
    seen = [key for batch in one_pass(loader(store, batch_size)) for key in keys(batch)]
    assert sorted(seen) == sorted(itertools.product(range(N_IMAGES), range(N_TOKENS)))


def test_small_buffers_lose_less_than_a_batch_each(store):
    small = loader(store, 7, n_buffer_images=10)
    seen = [key for batch in one_pass(small) for key in keys(batch)]
    assert len(seen) > N_IMAGES * N_TOKENS - 5 * 7


@given(**LOADERS, n_done=st.integers(0, 60))
@settings(max_examples=40)
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
    assert all(map(torch.equal, rest, take(second, 25)))


def test_one_seed_gives_one_order(store):
    first, second = take(loader(store, seed=3), 40), take(loader(store, seed=3), 40)
    assert all(map(torch.equal, first, second))


def test_another_seed_and_another_pass_give_another_order(store):
    passes = [
        [batch.tolist() for batch in one_pass(loader(store, 100, seed=seed))] for seed in (0, 1, -1)
    ]
    again = loader(store, 100, seed=0)
    again.state = LoaderState(n_pass=1)
    passes.append([batch.tolist() for batch in take(again, 3)])
    assert all(a != b for a, b in itertools.combinations(passes, 2))


def test_a_batch_mixes_the_images(store):
    """Entropy of the images in a batch, beside that of as many uniform draws."""
    n = 100
    for batch in take(loader(store, n), 6):
        counts = collections.Counter(image for image, _ in keys(batch)).values()
        entropy = -sum(c / n * math.log(c / n) for c in counts)
        assert entropy > 0.9 * math.log(N_IMAGES)


def test_tokens_fall_evenly_into_the_batches(store):
    """Over many passes each token is in the first batch as often as any other."""
    counts = collections.Counter()
    n_passes = 200
    for n_pass in range(n_passes):
        some = loader(store, 60)
        some.state = LoaderState(n_pass=n_pass)
        counts.update(keys(take(some, 1)[0]))
    expected = n_passes * 60 / (N_IMAGES * N_TOKENS)
    chi_square = sum((counts[k] - expected) ** 2 / (expected * 0.8) for k in counts)
    assert len(counts) == N_IMAGES * N_TOKENS
    assert 200 < chi_square < 400  # 300 degrees of freedom: ± 4 standard deviations


def test_small_buffers_change_from_pass_to_pass(store):
    def images_of_first_batch(n_pass):
        some = loader(store, 20, n_buffer_images=10)
        some.state = LoaderState(n_pass=n_pass)
        return frozenset(image for image, _ in keys(take(some, 1)[0]))

    assert len({images_of_first_batch(n) for n in range(5)}) == 5


def test_a_buffer_holds_no_more_than_asked_for(store):
    small = loader(store, 7, n_buffer_images=10)
    sizes = [sum(run.stop - run.start for run in group) for group in small._groups(0)]
    assert sum(sizes) == N_IMAGES
    assert max(sizes) <= 11
    assert min(sizes) >= 9


@pytest.mark.parametrize(("tokens", "wanted"), [("patches", range(1, 6)), ("special", range(1))])
def test_a_choice_of_tokens_is_loaded_alone(store, tokens, wanted):
    batches = one_pass(loader(store, 10, tokens=tokens))
    seen = sorted(key for batch in batches for key in keys(batch))
    assert seen == sorted(itertools.product(range(N_IMAGES), wanted))


@pytest.mark.parametrize("n_images", [1, 3, 10, 11, 12, 17, 24, 26, 33, 49, 50])
def test_a_buffer_of_just_one_batch_gives_batches(store, n_images):
    """Buffers of equal size could all be a little smaller than a batch, and no batch ever come."""
    some = loader(store, n_images * N_TOKENS, n_images)
    sizes = [sum(run.stop - run.start for run in group) for group in some._groups(0)]
    assert sum(sizes) == N_IMAGES
    assert max(sizes) >= n_images
    assert len(take(some, 12)) == 12


@pytest.mark.parametrize(("batch_size", "n_buffer_images"), [(301, 60), (61, 10), (7, 1)])
def test_too_few_tokens_for_a_batch_are_refused(store, batch_size, n_buffer_images):
    with pytest.raises(StoreError, match=r"A batch of \d+ tokens is more .* --batch-size"):
        loader(store, batch_size, n_buffer_images)


def test_batches_are_single_precision(tmp_path, store_of):
    table = numbered(20, 3)
    made = store_of(tmp_path / "s", {"residual@0": table}, dtype="bfloat16")
    some = ShuffledTokens(made, "residual@0", batch_size=60)
    (batch,) = take(some, 1)
    assert batch.dtype == torch.float32
    assert sorted(keys(batch)) == sorted(keys(table.flatten(0, 1)))


def test_a_store_with_empty_shards_is_loaded(tmp_path, numbered_images, table_model):
    from visae.activations.format import RecordConfig
    from visae.activations.record import record
    from visae.models.config import ModelConfig

    made = record(
        numbered_images(N_IMAGES, unreadable=range(16, 32)),
        table_model({"residual@0": numbered(N_IMAGES, N_TOKENS)}),
        tmp_path / "s",
        config=RecordConfig(sites=("residual@0",), dtype="float32", shard_bytes=1),
        model_config=ModelConfig(model="test/table"),
    )
    assert made.n_images_in_shard(1) == 0
    images = {image for batch in one_pass(loader(made, 4)) for image, _ in keys(batch)}
    assert images == set(range(N_IMAGES)) - set(range(16, 32))
