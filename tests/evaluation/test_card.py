import dataclasses
import json

import numpy as np
import pytest
import torch

from visae.errors import CheckpointError, ConfigError
from visae.evaluation.card import evaluate, read_card
from visae.evaluation.config import EvaluateConfig
from visae.progress import Progress
from visae.saes.config import SAEConfig
from visae.saes.sae import SAE
from visae.saes.sparsity import TopK
from visae.storage.records import read_json

QUICK = EvaluateConfig(n_resamples=1000, n_permutations=20, n_rotations=2)
METRICS = (
    "nmse",
    "cosine",
    "l0",
    "dead_share",
    "dense_share",
    "class_average_precision",
    "class_coverage",
    "top_precision",
    "stability_cosine",
    "stability_share",
    "final_cls_cosine",
    "final_patch_cosine",
    "score_kept",
)
CLASS_METRICS = METRICS[5:8]


@pytest.fixture(scope="module")
def card(planted, save):
    folder = save(planted.sae, planted.store)
    return evaluate(folder, planted.store, config=QUICK, others=[planted.sae])


def test_every_metric_stands_beside_its_nulls_or_says_why_it_does_not(card):
    assert tuple(row.name for row in card.rows) == METRICS
    for row in card.rows:
        assert row.nulls if row.value.value is not None else row.value.note
        if row.value.value is not None and row.better != "neither":
            assert row.difference is not None
            assert row.difference.null in row.nulls
        if row.value.value is not None and row.value.interval is None:
            assert row.value.note


def test_a_planted_sae_is_far_above_every_null(card):
    nmse, covered = card.row("nmse"), card.row("class_coverage")
    assert nmse.value.value < 0.1
    assert nmse.difference.estimate.interval.high < -0.1
    assert set(nmse.nulls) == {"untrained", "random activations", "mean predictor"}
    assert nmse.nulls["mean predictor"].value == 1
    assert covered.value.value == 1
    precision = card.row("class_average_precision")
    assert precision.value.value > 0.99
    assert precision.p_value == pytest.approx(1 / 21)
    assert precision.nulls["permuted labels"].value == pytest.approx(1 / 3, abs=0.06)
    assert card.row("top_precision").value.value == 1
    assert card.row("stability_cosine").value.value == pytest.approx(1)
    assert card.row("stability_share").difference.estimate.value > 0.5
    assert [(c.name, c.feature) for c in card.classes] == [("ant", 0), ("bee", 1), ("cat", 2)]


def test_the_baselines_have_the_saes_l0(card):
    row = card.row("l0")
    for null in ("untrained", "random activations"):
        assert row.nulls[null].value == pytest.approx(row.value.value, rel=0.02)
    assert row.difference is None


def test_what_the_card_says_of_the_data(card, planted):
    assert (card.n_images, card.n_tokens, card.n_features) == (160, 640, 16)
    assert card.store_digest == planted.store.digest
    assert card.l0_quantiles["1"] == 3
    assert card.density_quantiles["0"] == 0
    assert len(card.nmse_by_position) == 4
    assert card.grid == (2, 2)


def test_a_card_is_written_and_read_again(card, tmp_path):
    path = card.write(tmp_path)
    assert read_json(path)["kind"] == "report card"
    assert read_card(tmp_path) == card


def test_one_seed_gives_one_card(planted, save, card):
    again = evaluate(save(planted.sae, planted.store), planted.store, config=QUICK)
    assert again.row("nmse") == card.row("nmse")
    assert again.row("class_average_precision") == card.row("class_average_precision")


def test_the_mean_predictor_and_silent_codes_score_at_chance(planted, save):
    sae = SAE(SAEConfig(d_model=12, n_features=16, sparsity=TopK(k=1)))
    sae.mean.copy_(planted.activations.double().mean((0, 1)))
    card = evaluate(save(sae, planted.store), planted.store, config=QUICK, others=[planted.sae])
    assert card.row("nmse").value.value == pytest.approx(1, abs=1e-5)
    assert card.row("cosine").value.value == pytest.approx(0, abs=1e-5)
    precision = card.row("class_average_precision")
    assert precision.value.value == pytest.approx(1 / 3, abs=0.02)
    assert precision.p_value == 1
    assert card.row("top_precision").value.value == pytest.approx(1 / 3, abs=0.02)
    assert "no live feature" in card.row("stability_cosine").value.note


def test_permuted_labels_score_within_their_null(planted, make_store, save):
    labels = np.random.default_rng(0).permutation(planted.labels).tolist()
    store = make_store(planted.activations, labels=labels)
    card = evaluate(save(planted.sae, store), store, config=QUICK)
    for name in CLASS_METRICS:
        row = card.row(name)
        null = row.nulls["permuted labels"]
        slack = 0.05
        assert null.interval.low - slack <= row.value.value <= null.interval.high + slack
        assert row.p_value > 1 / 21


def test_images_without_labels_give_everything_but_class_metrics(planted, make_store, save):
    store = make_store(planted.activations)
    card = evaluate(save(planted.sae, store), store, config=QUICK)
    for name in CLASS_METRICS:
        row = card.row(name)
        assert (row.value.value, row.value.note) == (None, "the images have no labels")
    assert card.classes == ()
    assert card.row("nmse").value.value < 0.1
    assert "another SAE" in card.row("stability_share").value.note
    assert "model" in card.row("score_kept").value.note


def test_grouped_images_are_resampled_by_group(planted, make_store, save):
    groups = [f"group {i // 8}" for i in range(160)]
    store = make_store(planted.activations, labels=planted.labels, groups=groups)
    card = evaluate(save(planted.sae, store), store, config=QUICK)
    value = card.row("nmse").value
    assert (value.n_images, value.n_units) == (160, 20)
    assert card.row("class_coverage").value.n_units < 20


def test_two_groups_give_values_without_intervals(planted, make_store, save):
    groups = ["a" if i % 2 else "e" for i in range(160)]
    store = make_store(planted.activations, labels=planted.labels, groups=groups)
    sides = set(store.images.sides())
    assert sides == {"discovery", "confirmation"}
    card = evaluate(save(planted.sae, store), store, config=QUICK)
    for name in ("nmse", "class_coverage"):
        value = card.row(name).value
        assert value.value is not None
        assert value.interval is None
        assert "units that an interval needs" in value.note


def test_baselines_can_be_left_out(planted, save):
    config = dataclasses.replace(QUICK, baselines=())
    card = evaluate(save(planted.sae, planted.store), planted.store, config=config)
    assert set(card.row("nmse").nulls) == {"mean predictor"}
    assert set(card.row("class_coverage").nulls) == {"permuted labels"}
    assert card.row("dead_share").difference is None


def test_activations_that_never_vary_have_no_nmse(make_store, save):
    x = torch.arange(12.0).expand(10, 4, 12).clone()
    x[5:, 0] += 1  # the store needs some variance; positions 1 to 3 have none
    x[:5, 0] -= 1
    store = make_store(x)
    sae = SAE(SAEConfig(d_model=12, n_features=16, sparsity=TopK(k=1)))
    card = evaluate(save(sae, store), store, config=QUICK)
    assert card.nmse_by_position[1:] == (None, None, None)
    assert card.nmse_by_position[0] is not None
    assert json.dumps(card.nmse_by_position, allow_nan=False)


def test_an_sae_of_another_model_is_refused(planted, save, make_store):
    folder = save(planted.sae, planted.store)
    other = make_store(torch.randn(4, 5, 12), tokens="special", special=("cls",) * 5)
    with pytest.raises(CheckpointError, match="was not made for this store"):
        evaluate(folder, other, config=QUICK)


def test_an_sae_of_another_width_cannot_be_compared(planted, save, random_sae):
    with pytest.raises(CheckpointError, match="width 12 cannot be matched with width 7"):
        evaluate(
            save(planted.sae, planted.store),
            planted.store,
            config=QUICK,
            others=[random_sae(d_model=7)],
        )


def test_progress_runs_over_the_sae_and_its_baselines(planted, save):
    told: list[Progress] = []
    evaluate(save(planted.sae, planted.store), planted.store, config=QUICK, progress=told.append)
    assert [step.done for step in told] == [60, 120, 160, 220, 280, 320, 380, 440, 480]
    assert {step.total for step in told} == {480}
    assert [step.note for step in told[::3]] == ["sae", "untrained", "random activations"]


def test_an_unknown_metric_is_named_with_the_known_ones(card):
    with pytest.raises(ConfigError, match="nmse, cosine, l0"):
        card.row("accuracy")


def test_a_folder_without_a_card_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no report card"):
        read_card(tmp_path)
