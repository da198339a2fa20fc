"""``train`` on a choice of tokens, on a running model, and on another toolkit's folder."""

import json

import numpy as np
import pytest

from visae.activations.store import ActivationStore
from visae.evaluation.card import read_card
from visae.saes.checkpoint import read_sae_record

SHAPE = ("--n-features", 48, "--k", 3, "--n-tokens", 1500, "--batch-size", 64)


@pytest.fixture
def store(workspace):
    return workspace / "activations" / "photos"


@pytest.fixture
def live(home):
    """What trains on photos without a store, but for the site."""
    return [
        *("train", "--images", home / "photos", "--model", "test_vit", "--image-size", 32),
        *("--weights", home / "weights.safetensors", *SHAPE),
    ]


@pytest.fixture
def saev_folder(tmp_path):
    """A shard folder of 30 images of a class token and 4 patches at two layers."""
    folder = tmp_path / "shards"
    folder.mkdir()
    values = np.random.default_rng(0).normal(size=(30, 2, 5, 8)).astype(np.float32)
    values.tofile(folder / "acts000000.bin")
    metadata = {
        "family": "clip",
        "ckpt": "ViT",
        "layers": [1, 3],
        "d_model": 8,
        "n_examples": 30,
        "content_tokens_per_example": 4,
        "cls_token": True,
        "max_tokens_per_shard": 300,
        "data": "gASVAA==",
        "dataset": "images",
        "dtype": "float32",
        "protocol": "2.1",
    }
    (folder / "metadata.json").write_text(json.dumps(metadata))
    shards = [{"name": "acts000000.bin", "n_examples": 30}]
    (folder / "shards.json").write_text(json.dumps(shards))
    return folder


def where(folder):
    return read_sae_record(folder).provenance.recipe["loop"]["where"]


def test_a_choice_of_tokens(visae, store, tmp_path):
    chosen = ("--labels", "red", "--side", "discovery", "--patch-rows", 0, 1)
    size = ("--site", "residual@2", "--n-features", 16, "--k", 2, "--batch-size", 8)
    assert visae("train", "--store", store, "--out", tmp_path / "a", *size, *chosen)[0] == 0
    found = where(tmp_path / "a")
    assert (found["labels"], found["side"], found["patch_rows"]) == (["red"], "discovery", [0, 1])


def test_without_a_number_of_tokens_it_is_twenty_passes_over_the_choice(visae, store, tmp_path):
    site = ("--site", "residual@2", "--labels", "red", "--batch-size", 16, "--n-features", 16)
    code, _, _ = visae("train", "--store", store, "--out", tmp_path / "a", "--k", 2, *site)
    per_image = ActivationStore(store).tokens_per_image("residual@2", "patches")
    assert code == 0
    loop = read_sae_record(tmp_path / "a").provenance.recipe["loop"]
    assert loop["n_tokens"] == 20 * 24 * per_image


def test_images_and_a_model_instead_of_a_store(visae, live, home, tmp_path):
    out = tmp_path / "saes" / "a"
    code, said, _ = visae(*live, "--site", "residual@2", "--out", out)
    assert code == 0
    made = read_sae_record(out).provenance
    assert (made.site, made.n_tokens) == ("residual@2", 1472)
    assert made.images == str(home / "photos")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saes"]
    (line,) = [line for line in said.splitlines() if line.startswith("Next: visae record ")]
    assert f"--images {home / 'photos'} --model test_vit --weights {home}" in line
    assert "--image-size 32 --site residual@2 --out DIR" in line


def test_the_shards_of_saev(visae, saev_folder, tmp_path):
    out = tmp_path / "sae"
    site = ("--site", "residual@3")
    assert visae("train", "--store", saev_folder, "--out", out, *site, *SHAPE)[0] == 0
    assert read_sae_record(out).provenance.model.name == "saev/clip/ViT"
    assert visae("evaluate", "--sae", out, "--store", saev_folder, "--no-fidelity")[0] == 0
    assert read_card(out).n_tokens == 120


def test_a_store_and_images_are_refused(fails, live, store, tmp_path):
    said = fails(*live, "--store", store, "--out", tmp_path / "a")
    assert "A store was given, and images or a model besides" in said


@pytest.mark.parametrize("given", [[], ["--images", "x"], ["--model", "test_vit"]])
def test_nothing_to_train_on_is_refused(fails, tmp_path, given):
    assert "nothing to train on" in fails("train", "--out", tmp_path / "a", *given)


def test_a_filter_without_a_store_is_refused(fails, live, tmp_path):
    said = fails(*live, "--site", "residual@2", "--labels", "red", "--out", tmp_path / "a")
    assert "only from a store" in said


def test_a_running_model_needs_a_site(fails, live, tmp_path):
    said = fails(*live, "--out", tmp_path / "a")
    assert "several sites" in said
    assert "residual@2" in said


def test_an_unknown_label_is_named(fails, store, train_arguments, tmp_path):
    said = fails(*train_arguments(store, tmp_path / "a", "--labels", "rde"))
    assert "No image has the label rde" in said
    assert "red" in said


def test_fidelity_on_the_shards_of_saev_is_refused(fails, visae, saev_folder, tmp_path):
    out, site = tmp_path / "sae", ("--site", "residual@3")
    assert visae("train", "--store", saev_folder, "--out", out, *site, *SHAPE)[0] == 0
    assert "Add --no-fidelity" in fails("evaluate", "--sae", out, "--store", saev_folder)


# The loop


def test_the_options_of_the_loop(visae, store, train_arguments, tmp_path):
    options = ["--warmup-steps", 3, "--decay-share", 0.5, "--penalty-warmup-share", 0.1]
    options += ["--k-start", 2, "--average-decay", 0.9, "--engine", "torch", "--device", "cpu"]
    code, _, complaint = visae(*train_arguments(store, tmp_path / "a", *options))
    assert code == 0
    assert "engine torch: asked for" in complaint
    made = read_sae_record(tmp_path / "a").provenance
    assert made.engine.startswith("torch")
    loop = made.recipe["loop"]
    assert loop["rate_schedule"] == {"warmup_steps": 3, "decay_share": 0.5}
    assert loop["penalty_schedule"] == {"warmup_share": 0.1}
    assert loop["k_schedule"]["start"] == 2
    assert loop["average_decay"] == 0.9


def test_the_engine_is_said_once_for_many_saes(visae, store, train_arguments, tmp_path):
    arguments = train_arguments(store, tmp_path / "a", "--seeds", 0, 1, 2)
    code, _, complaint = visae(*arguments)
    assert code == 0
    assert complaint.count("engine numba: the fastest for cpu") == 1


def test_an_engine_that_cannot_train_the_kind_is_refused(fails, store, train_arguments, tmp_path):
    relu = ["--kind", "relu", "--engine", "numba"]
    said = fails(*train_arguments(store, tmp_path / "a", *relu))
    assert "The engine numba cannot train this SAE: a: sparsity relu" in said


def test_more_features_per_token_than_features_are_refused(fails, store, train_arguments, tmp_path):
    said = fails(*train_arguments(store, tmp_path / "a", "--n-features", 16, "--k", 17))
    assert "k is 17 and n_features is 16" in said


def test_a_tracker_gets_the_figures(visae, store, train_arguments, tmp_path):
    pytest.importorskip("tensorboard")
    arguments = train_arguments(store, tmp_path / "a", "--track", "tensorboard")
    assert visae(*arguments)[0] == 0
    assert list((tmp_path / "a" / "tensorboard").iterdir())
