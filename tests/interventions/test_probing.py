"""Where the probe's features come from, and when a saved probe is used again."""

import dataclasses

import pytest
import torch

from visae.errors import ExperimentError
from visae.interventions import probing
from visae.interventions.probing import obtain_probe
from visae.interventions.spec import LinearProbeConfig
from visae.models.config import ModelIdentity

MEAN = LinearProbeConfig(pool="mean-patch")


@pytest.fixture(scope="module")
def discovery(planted_lab):
    return [i for i, s in enumerate(planted_lab.store.images.sides()) if s == "discovery"]


def obtain(lab, rows, folder, config=MEAN, **changes):
    settings = {"store": lab.store, "model": lab.model, "source": lab.store.source()} | changes
    return obtain_probe(config, rows=rows, folder=folder, **settings)


@pytest.mark.parametrize("pool", ["cls", "mean-patch"])
def test_recorded_and_computed_final_tokens_give_the_same_probe(
    planted_lab, discovery, tmp_path, pool
):
    recorded = obtain(planted_lab, discovery, tmp_path / "a", LinearProbeConfig(pool=pool))
    absent = LinearProbeConfig(pool=pool, site="nowhere")
    computed = obtain(planted_lab, discovery, tmp_path / "b", absent)
    assert torch.allclose(recorded.weight, computed.weight, rtol=1e-2, atol=1e-3)
    assert recorded.accuracy == pytest.approx(computed.accuracy, abs=0.05)
    assert recorded.classes == ("blue", "red")
    assert recorded.layout == planted_lab.model.layout("residual@0")


def test_the_probe_reads_the_final_tokens_of_the_rows_given(planted_lab, discovery, tmp_path):
    """Rows out of order, from the store and from the model: the same features in that order."""
    rows = discovery[::-1][:7]
    finals = probing._FinalTokens(
        MEAN, planted_lab.store, planted_lab.model, planted_lab.store.source()
    )
    stored, computed = finals._stored(rows), finals._computed(rows, print)
    assert torch.allclose(stored, computed, atol=1e-4)
    tokens = planted_lab.store.shard("norm", 0).activations
    assert torch.allclose(stored, tokens[rows][:, 1:].mean(1))


def test_another_site_is_not_taken_for_the_final_tokens(planted_lab, discovery, tmp_path):
    """It has the right width, so a probe would learn from it and then read something else."""
    wrong = LinearProbeConfig(pool="mean-patch", site="residual@0")
    with pytest.raises(ExperimentError, match="residual@0 does not hold the model's final") as c:
        obtain(planted_lab, discovery, tmp_path, wrong)
    assert c.value.where == "task.site"
    assert not (tmp_path / "probe.json").exists()


def test_a_saved_probe_is_used_again(planted_lab, discovery, tmp_path, monkeypatch):
    first = obtain(planted_lab, discovery, tmp_path)
    monkeypatch.setattr(probing, "fit_linear_probe", None)
    again = obtain(planted_lab, discovery, tmp_path)
    assert torch.equal(first.weight, again.weight)


def test_a_saved_probe_of_other_images_labels_or_pool_is_not(planted_lab, discovery, tmp_path):
    first = obtain(planted_lab, discovery, tmp_path)
    for rows, config in ((discovery[:-2], MEAN), (discovery, LinearProbeConfig(pool="cls"))):
        obtain(planted_lab, discovery, tmp_path)
        other = obtain(planted_lab, rows, tmp_path, config)
        assert not torch.equal(other.weight, first.weight)


def test_relabelled_images_need_a_new_probe(make_planted_lab, tmp_path, discovery):
    """The store's digest holds no labels, and the images are the same: the labels must count."""
    labels = ["red" if i % 2 else "blue" for i in range(80)]
    before = make_planted_lab(tmp_path / "a", labels=labels)
    swapped = [{"red": "blue", "blue": "red"}[label] for label in labels]
    after = make_planted_lab(tmp_path / "b", labels=swapped)
    assert before.store.digest == after.store.digest
    first = obtain(before, discovery, tmp_path / "probe")
    second = obtain(after, discovery, tmp_path / "probe")
    assert first.image_ids_digest != second.image_ids_digest
    assert torch.allclose(first.weight, second.weight.flip(0), atol=1e-3)


def test_a_saved_probe_of_another_model_is_refused(planted_lab, discovery, tmp_path):
    probe = obtain(planted_lab, discovery, tmp_path)
    other = ModelIdentity(name="timm/other", title="Other", weights_sha256="0" * 64)
    dataclasses.replace(probe, model=other).save(tmp_path)
    with pytest.raises(ExperimentError, match="other weights"):
        obtain(planted_lab, discovery, tmp_path)


def test_one_class_is_no_task(planted_lab, discovery, tmp_path):
    labels = planted_lab.store.images.labels
    red = [row for row in discovery if labels[row] == "red"]
    few = red + [row for row in discovery if labels[row] == "blue"][:4]
    for rows in (red, few):
        with pytest.raises(ExperimentError, match="there is 1"):
            obtain(planted_lab, rows, tmp_path)


def test_images_without_labels_are_no_task(make_planted_lab, tmp_path):
    lab = make_planted_lab(tmp_path, n_images=16, labels=[""] * 16)
    with pytest.raises(ExperimentError, match="there are 0"):
        obtain(lab, range(16), tmp_path / "probe")


def test_a_store_without_special_tokens_is_no_obstacle(planted_lab, discovery, tmp_path, store_of):
    """Only the patches of the final norm were recorded: the tokens are computed instead."""
    from visae.activations.format import RecordConfig
    from visae.activations.record import record
    from visae.images.opening import open_images
    from visae.models.config import ModelConfig

    store = record(
        open_images(str(planted_lab.images)),
        planted_lab.model,
        tmp_path / "store",
        config=RecordConfig(sites=("norm",), tokens="patches"),
        model_config=ModelConfig(model="timm/planted"),
    )
    probe = obtain(planted_lab, discovery, tmp_path / "a", LinearProbeConfig(), store=store)
    whole = obtain(planted_lab, discovery, tmp_path / "b", LinearProbeConfig())
    assert torch.allclose(probe.weight, whole.weight, rtol=1e-2, atol=1e-3)
