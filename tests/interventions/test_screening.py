"""Screening: every class's best feature and what ablating it does, on discovery images alone."""

import pytest

from visae.errors import ExperimentError
from visae.interventions import screening
from visae.interventions.discovery import profile_features, select
from visae.interventions.effects import Laboratory
from visae.interventions.probing import obtain_probe
from visae.interventions.screening import best_features, screen_classes
from visae.interventions.spec import BestForClass, LinearProbeConfig

SITE = "residual@0"


@pytest.fixture(scope="module")
def discovery(planted_lab):
    return [i for i, s in enumerate(planted_lab.store.images.sides()) if s == "discovery"]


@pytest.fixture(scope="module")
def profiles(planted_lab, discovery):
    return profile_features(planted_lab.sae, planted_lab.store, SITE, "patches", discovery)


def test_the_best_features_are_those_a_selection_would_choose(planted_lab, discovery, profiles):
    labels = [planted_lab.store.images.labels[row] for row in discovery]
    found = best_features(profiles, labels)
    assert [c.class_name for c in found] == ["blue", "red"]
    for candidate in found:
        rule = BestForClass(class_name=candidate.class_name)
        chosen = select(rule, profiles, labels, sae_sha256="")
        assert (candidate.feature, candidate.score) == (chosen.feature, chosen.score)
        assert candidate.prevalence == labels.count(candidate.class_name) / len(labels)
        assert candidate.effect is None


def test_without_labels_there_is_nothing_to_screen(profiles):
    with pytest.raises(ExperimentError, match="No discovery image has a label"):
        best_features(profiles, [None] * len(profiles.rows))


def test_screening_looks_at_discovery_images_of_the_class(
    planted_lab, discovery, profiles, tmp_path, monkeypatch
):
    lab, labels = planted_lab, planted_lab.store.images.labels
    source = lab.store.source()
    task = LinearProbeConfig(pool="mean-patch")
    probe = obtain_probe(task, lab.store, lab.model, source, discovery, folder=tmp_path)
    laboratory = Laboratory(lab.store, source, lab.model, SITE, lab.sae, probe)
    seen = []
    measure = screening.measure
    monkeypatch.setattr(
        screening,
        "measure",
        lambda lab, rows, *a, **k: seen.append(rows) or measure(lab, rows, *a, **k),
    )
    told = []
    candidates = best_features(profiles, [labels[row] for row in discovery])
    found = screen_classes(laboratory, profiles, candidates, n_images=7, progress=told.append)
    for rows, candidate in zip(seen, found, strict=True):
        assert len(rows) == 7
        assert set(rows) <= set(discovery)
        assert {labels[row] for row in rows} == {candidate.class_name}
    assert found[1].effect < -0.1
    assert [(p.done, p.total) for p in told] == [(1, 2), (2, 2)]
