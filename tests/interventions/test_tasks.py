"""Tasks: the probe against scikit-learn on raw features, and the measures written naively."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from visae.errors import ExperimentError
from visae.interventions.tasks import (
    LinearProbe,
    Task,
    class_index,
    fit_linear_probe,
    pool_tokens,
    read_outcome,
)
from visae.models.config import ModelIdentity
from visae.models.layout import Layout
from visae.models.protocol import Output

LAYOUT = Layout(special=("register0", "cls"), grid=(1, 2))
MODEL = ModelIdentity(name="timm/a", title="A", weights_sha256="a" * 64)
OTHER = ModelIdentity(name="timm/a", title="A", weights_sha256="b" * 64)


def blobs(n_classes=3, n_images=60, *, spread=1.0, seed=0):
    """Features of unequal scale and offset, in clusters; and their classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n_images) % n_classes
    centres = 2.0 * torch.randn(n_classes, 5, generator=generator)
    noise = spread * torch.randn(n_images, 5, generator=generator)
    scale = torch.tensor([100.0, 1.0, 0.01, 5.0, 1.0])
    return (centres[labels] + noise) * scale + 3.0, labels


def fit(features, labels, *, n_classes=3, pool="cls"):
    return fit_linear_probe(
        features,
        labels,
        classes=["a", "b", "c"][:n_classes],
        model=MODEL,
        layout=LAYOUT,
        pool=pool,
        image_ids_digest="digest",
    )


def as_output(features):
    """Final tokens whose CLS token (the second) holds the features."""
    tokens = torch.zeros(len(features), LAYOUT.n_tokens, features.shape[1])
    tokens[:, 1] = features
    return Output(tokens, None)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_the_probe_is_sklearns_on_standardised_features(n_classes):
    features, labels = blobs(n_classes)
    probe = fit(features, labels, n_classes=n_classes)
    x = features.double().numpy()
    x = (x - x.mean(0)) / x.std(0)
    reference = LogisticRegression(C=probe.regularisation, max_iter=500, tol=1e-3)
    reference.fit(x, labels.numpy())
    found = probe.logits(as_output(features)).double().softmax(dim=1).numpy()
    assert np.abs(found - reference.predict_proba(x)).max() < 1e-5
    assert probe.weight.shape == (n_classes, 5)
    assert isinstance(probe, Task)


def test_the_probe_learns_what_is_there_and_nothing_else():
    features, labels = blobs(spread=0.3)
    probe = fit(features, labels)
    assert probe.accuracy > 0.95
    assert probe.chance == pytest.approx(1 / 3)
    accuracies = []
    for seed in range(5):
        order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
        accuracies.append(fit(features, labels[order]).accuracy)
    assert np.mean(accuracies) < 1 / 3 + 2 * np.sqrt(2 / 9 / 60)


def test_chance_is_the_largest_class():
    features, labels = blobs(2)
    labels = (torch.arange(60) % 4 == 0).long()
    assert fit(features, labels, n_classes=2).chance == pytest.approx(0.75)


def test_a_feature_that_never_varies_does_no_harm():
    features, labels = blobs(spread=0.3)
    features[:, 4] = 7.0
    probe = fit(features, labels)
    assert torch.isfinite(probe.weight).all()
    moved = features.clone()
    moved[:, 4] += 0.0
    assert probe.accuracy > 0.9


def test_a_class_with_too_few_images_is_named():
    features, labels = blobs()
    labels[:] = 0
    labels[:30], labels[30:34] = 1, 2
    with pytest.raises(ExperimentError, match="Class c has 4 discovery images"):
        fit(features, labels)


def test_measures_are_the_naive_ones():
    logits = torch.tensor([[1.0, 3.0, 2.0], [50.0, -50.0, 0.0], [2.0, 2.0, 2.0]])
    expected = {"probability": [], "logit": [], "margin": []}
    for row in logits.double().tolist():
        powers = [np.exp(v - max(row)) for v in row]
        expected["probability"].append(powers[1] / sum(powers))
        expected["logit"].append(row[1])
        expected["margin"].append(row[1] - max(row[0], row[2]))
    for measure, values in expected.items():
        found = read_outcome(logits, 1, measure)
        assert found.dtype == torch.float64
        assert torch.allclose(found, torch.tensor(values, dtype=torch.float64), rtol=1e-12)


def test_a_constant_predictor_has_the_same_outcome_on_every_image():
    logits = torch.zeros(4, 3).index_fill(1, torch.tensor([0]), 5.0)
    for measure in ("probability", "logit", "margin"):
        assert read_outcome(logits, 0, measure).unique().numel() == 1


def test_pooling():
    tokens = torch.arange(8.0).reshape(1, 4, 2)
    assert pool_tokens(tokens, "cls", LAYOUT).tolist() == [[2.0, 3.0]]
    assert pool_tokens(tokens, "mean-patch", LAYOUT).tolist() == [[5.0, 6.0]]
    patches_only = tokens[:, :2]  # final tokens without the special ones
    assert pool_tokens(patches_only, "mean-patch", LAYOUT).tolist() == [[1.0, 2.0]]
    with pytest.raises(ExperimentError, match="no CLS token") as caught:
        pool_tokens(patches_only, "cls", LAYOUT)
    assert "mean-patch" in caught.value.fix


def test_classes_are_found_by_name():
    probe = fit(*blobs())
    assert class_index(probe, "b") == 1
    probe = dataclasses.replace(probe, classes=("truck", "car", "ship"))
    with pytest.raises(ExperimentError, match="no class trukc") as caught:
        class_index(probe, "trukc")
    assert "Use one of: truck" in caught.value.fix


def test_a_probe_refuses_another_model_and_another_width():
    probe = fit(*blobs())
    probe.require_model(MODEL)
    with pytest.raises(ExperimentError, match="other weights"):
        probe.require_model(OTHER)
    with pytest.raises(ExperimentError, match="width 5, not 6"):
        probe.logits(as_output(torch.zeros(2, 6)))


def test_a_saved_probe_is_the_same_probe(tmp_path):
    probe = fit(*blobs())
    probe.save(tmp_path)
    loaded = LinearProbe.load(tmp_path)
    for field in dataclasses.fields(probe):
        before, after = getattr(probe, field.name), getattr(loaded, field.name)
        same = torch.equal(before, after) if isinstance(before, torch.Tensor) else before == after
        assert same, field.name


def test_an_altered_probe_is_refused(tmp_path):
    fit(*blobs()).save(tmp_path)
    weights = tmp_path / "probe.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ExperimentError, match="checksum"):
        LinearProbe.load(tmp_path)
    weights.write_bytes(data[:-4])
    with pytest.raises(ExperimentError, match="bytes instead of"):
        LinearProbe.load(tmp_path)
    weights.unlink()
    with pytest.raises(ExperimentError, match="missing"):
        LinearProbe.load(tmp_path)


def test_a_probe_whose_classes_and_weights_differ_is_refused(tmp_path):
    fit(*blobs()).save(tmp_path)
    path = tmp_path / "probe.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"classes": ["a", "b"]}))
    with pytest.raises(ExperimentError, match="not those of 2 classes"):
        LinearProbe.load(tmp_path)
    path.write_text(json.dumps(record | {"format": 2}))
    with pytest.raises(ExperimentError, match="newer"):
        LinearProbe.load(tmp_path)
