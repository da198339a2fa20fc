import dataclasses
import itertools
import threading

import pytest
import torch

from visae.activations.live import LiveTokens
from visae.activations.loaders import ShuffledTokens
from visae.activations.mixing_buffer import LoaderState
from visae.activations.stream import TokenStream
from visae.errors import ConfigError, ImageError, ModelError, StoreError
from visae.images.opening import open_images
from visae.saes.checkpoint import load_sae, read_sae_record
from visae.saes.sparsity import TopK
from visae.training.config import RunConfig, TrainConfig
from visae.training.loop import train, train_on

N_IMAGES, N_TOKENS = 50, 6
SITE = "residual@0"
IMAGE_BYTES = N_TOKENS * 2 * 2


def numbered(n_images=N_IMAGES, n_tokens=N_TOKENS):
    image, token = torch.meshgrid(torch.arange(n_images), torch.arange(n_tokens), indexing="ij")
    return torch.stack([image, token], dim=2).float()


@pytest.fixture
def make_live(numbered_images, table_model):
    """A stream over numbered images; ``buffer`` is in images."""

    def make(batch_size=20, buffer=1000, *, unreadable=(), sites=(SITE,), **options):
        tables = {SITE: numbered(), "mlp@1": 2 * numbered()}
        return LiveTokens(
            numbered_images(N_IMAGES, unreadable=unreadable),
            table_model(tables, special=("cls",)),
            *sites,
            batch_size=batch_size,
            buffer_bytes=buffer * IMAGE_BYTES * len(sites),
            **{"images_per_forward": 7, "tokens": "all"} | options,
        )

    return make


def take(stream, n):
    return list(itertools.islice(iter(stream), n))


def keys(batches, site=SITE):
    return [tuple(key) for b in batches for key in b.activations[site].int().tolist()]


def equal(first, second):
    return all(
        torch.equal(a.activations[SITE], b.activations[SITE]) and torch.equal(a.images, b.images)
        for a, b in zip(first, second, strict=True)
    )


def product(images, positions=range(N_TOKENS)):
    return sorted(itertools.product(images, positions))


# Tokens


@pytest.mark.parametrize("buffer", [20, 1000])
def test_every_token_comes_once_a_pass(make_live, buffer):
    seen = keys(take(make_live(20, buffer), 30))
    assert sorted(seen[:300]) == sorted(seen[300:]) == product(range(N_IMAGES))
    assert seen[:300] != seen[300:]


def test_a_batch_says_which_tokens_it_has(make_live):
    for batch in take(make_live(30, 22, tokens="patches"), 12):
        found = list(zip(batch.images.tolist(), batch.positions.tolist(), strict=True))
        assert keys([batch]) == found
        assert batch.activations[SITE].dtype == torch.bfloat16


def test_one_pass_of_the_model_feeds_several_sites(make_live, monkeypatch):
    stream = make_live(sites=(SITE, "mlp@1"))
    asked, tokens = [], stream._model.tokens

    def counted(pixels, sites):
        asked.append((len(pixels), tuple(sites)))
        return tokens(pixels, sites)

    monkeypatch.setattr(stream._model, "tokens", counted)
    for batch in take(stream, 30):
        assert torch.equal(batch.activations["mlp@1"], 2 * batch.activations[SITE])
    assert asked == [(7, (SITE, "mlp@1"))] * 7 + [(1, (SITE, "mlp@1"))]  # all fits: run once


@pytest.mark.parametrize("buffer", [20, 1000])
@pytest.mark.parametrize("n_done", [0, 1, 7, 16])
def test_it_is_taken_up_at_any_batch(make_live, buffer, n_done):
    first = make_live(20, buffer, unreadable={3, 17})
    batches = iter(first)
    list(itertools.islice(batches, n_done))
    state = first.state
    rest = list(itertools.islice(batches, 12))
    second = make_live(20, buffer, unreadable={3, 17})
    second.state = dataclasses.replace(state)
    assert equal(rest, take(second, 12))


def test_a_stream_that_was_stopped_half_way_starts_whole(make_live):
    """What a filling that was given up had computed must not pass for a whole filling."""
    stream = make_live(20, 20)
    expected = take(make_live(20, 20), 16)
    for _ in range(5):
        endless = iter(stream)
        next(endless)
        endless.close()
        stream.state = LoaderState()
    assert equal(take(stream, 16), expected)


def test_another_seed_gives_another_order(make_live):
    assert keys(take(make_live(seed=1), 15)) != keys(take(make_live(seed=2), 15))


@pytest.mark.parametrize("buffer", [20, 1000])
def test_images_that_cannot_be_read_are_left_out_and_named(make_live, buffer):
    stream = make_live(12, buffer, unreadable={3, 17})
    readable = [i for i in range(N_IMAGES) if i not in (3, 17)]
    seen = keys(take(stream, 24))
    assert sorted(seen) == product(readable)
    assert [(s.ref, s.reason) for s in stream.skipped] == [
        ("17", "Image 17 is broken"),
        ("3", "Image 3 is broken"),
    ]


def test_nothing_is_left_running(make_live):
    take(make_live(20, 20), 3)
    assert not [t.name for t in threading.enumerate() if t.name.startswith("visae")]


def test_worker_processes_give_the_same(make_live):
    expected = take(make_live(30, 20), 12)
    assert equal(take(make_live(30, 20, workers=1), 12), expected)


# As a stream


def test_it_is_a_stream(make_live):
    stream = make_live()
    assert isinstance(stream, TokenStream)
    assert (stream.images, stream.tokens) == ("numbered:", "all")
    assert stream.model.weights_sha256 == "0" * 64
    assert (stream.d_model(SITE), stream.layout(SITE).special) == (2, ("cls",))
    assert stream.digest == make_live(sites=("mlp@1",)).digest


def test_the_normalisation_is_that_of_random_images(make_live, monkeypatch):
    whole = make_live(tokens="patches").normalisation(SITE)
    patches = numbered()[:, 1:].flatten(0, 1).double()
    torch.testing.assert_close(whole.mean, patches.mean(0))
    assert whole.scale == pytest.approx(float(patches.var(0, correction=0).mean().sqrt()))
    monkeypatch.setattr("visae.activations.live._MEASURED_TOKENS", 61)
    some = make_live(tokens="patches")
    assert some.normalisation(SITE).n_tokens == 65
    assert torch.equal(
        some.normalisation(SITE).mean, make_live(tokens="patches").normalisation(SITE).mean
    )
    assert not torch.equal(some.normalisation(SITE).mean, whole.mean)


def test_the_reference_is_of_images_that_can_be_read(make_live):
    reference = make_live(unreadable=range(9), tokens="patches").reference()
    assert keys([reference]) == product(range(9, 16), range(1, 6))


# Training


CONFIG = TrainConfig(n_tokens=2000, batch_size=50, log_steps=1, checkpoint_seconds=0.0)


@pytest.fixture
def make_stream(planted_folder, tiny_vit):
    """A live stream of a tiny ViT on 20 real images, in two fillings a pass."""

    def make(**options):
        return LiveTokens(
            open_images(planted_folder),
            tiny_vit,
            "residual@1",
            "mlp@2",
            **{"batch_size": 50, "buffer_bytes": 19 * 16 * 64 * 2} | options,
        )

    return make


def runs():
    common = {"n_features": 48, "sparsity": TopK(k=3), "learning_rate": 3e-3}
    return [RunConfig(name="a", **common), RunConfig(name="b", site="mlp@2", **common)]


def test_an_interrupted_run_resumes_bit_for_bit(make_stream, tmp_path):
    def stop(told):
        if told.done > 1100:
            raise KeyboardInterrupt

    train_on(make_stream(), runs(), tmp_path / "whole", config=CONFIG)
    with pytest.raises(KeyboardInterrupt):
        train_on(make_stream(), runs(), tmp_path / "cut", config=CONFIG, progress=stop)
    train_on(make_stream(), runs(), tmp_path / "cut", config=CONFIG)
    for name in ("a/sae.safetensors", "b/sae.safetensors", "a/sae.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    made = read_sae_record(tmp_path / "whole" / "b").provenance
    assert (made.site, made.tokens) == ("mlp@2", "patches")
    assert made.images == make_stream().images
    assert made.n_tokens == 2000


def test_it_learns_what_a_store_teaches(make_stream, planted_folder, tiny_vit, tmp_path):
    """All tokens fit, and so the same tokens come in the same order as from a store."""
    from visae.activations.format import RecordConfig
    from visae.activations.record import record
    from visae.models.config import ModelConfig

    store = record(
        open_images(planted_folder),
        tiny_vit,
        tmp_path / "store",
        config=RecordConfig(sites=("residual@1", "mlp@2"), tokens="patches"),
        model_config=ModelConfig(model="timm/tiny"),
    )
    saes = train_on(make_stream(buffer_bytes=2**20), runs()[:1], tmp_path / "live", config=CONFIG)
    (taught,) = train(store, "residual@1", runs()[:1], tmp_path / "stored", config=CONFIG)
    torch.testing.assert_close(saes[0].mean, taught.mean)
    tokens = torch.cat([s.activations for s in store.shards("residual@1")]).flatten(0, 1).float()
    errors = [float((sae(tokens) - tokens).square().mean()) for sae in (saes[0], taught)]
    assert errors[0] == pytest.approx(errors[1], rel=0.1)
    assert load_sae(tmp_path / "live" / "a").config == taught.config
    assert isinstance(ShuffledTokens(store, "mlp@2", batch_size=5), TokenStream)


# What cannot be done


def test_no_images_are_refused(numbered_images, table_model):
    model = table_model({SITE: numbered()})
    with pytest.raises(ImageError, match="There are no images"):
        LiveTokens(numbered_images(0), model, SITE, batch_size=5)


def test_images_that_come_in_order_only_are_refused(numbered_images, table_model):
    source = numbered_images(N_IMAGES)
    source.is_stream = True
    with pytest.raises(ImageError, match=r"one after another.*visae record"):
        LiveTokens(source, table_model({SITE: numbered()}), SITE, batch_size=5)


def test_none_that_can_be_read_is_an_error(make_live):
    with pytest.raises(ImageError, match="None of the 50 images can be read; one of them: Image"):
        take(make_live(unreadable=range(N_IMAGES)), 1)


@pytest.mark.parametrize(("batch_size", "buffer"), [(301, 1000), (61, 20)])
def test_batches_larger_than_what_there_is_are_refused(make_live, batch_size, buffer):
    with pytest.raises(StoreError, match="A batch of"):
        make_live(batch_size, buffer)


def test_tokens_that_the_model_lacks_are_refused(numbered_images, table_model):
    model = table_model({SITE: numbered()})
    with pytest.raises(ModelError, match="no special tokens"):
        LiveTokens(numbered_images(N_IMAGES), model, SITE, tokens="special", batch_size=5)


def test_sites_of_different_layouts_are_refused(numbered_images, table_model):
    tables = {SITE: numbered(), "mlp@0": numbered(n_tokens=4)}
    with pytest.raises(ModelError, match="2 token layouts"):
        LiveTokens(numbered_images(N_IMAGES), table_model(tables), *tables, batch_size=5)


@pytest.mark.parametrize("options", [{"images_per_forward": 0}, {"workers": -1}])
def test_impossible_numbers_are_refused(make_live, options):
    with pytest.raises(ConfigError, match="images at a time"):
        make_live(**options)


def test_activations_that_are_no_numbers_name_the_image(numbered_images, table_model):
    table = numbered()
    table[31, 2] = float("nan")
    stream = LiveTokens(numbered_images(N_IMAGES), table_model({SITE: table}), SITE, batch_size=20)
    with pytest.raises(ModelError, match="NaN or infinite activations at residual@0 for image 31"):
        take(stream, 15)
