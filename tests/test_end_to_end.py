"""The whole path on synthetic images with a planted concept, with an SAE that has to learn it.

A red or a blue patch at a random place decides the class. Nothing tells the SAE so: it learns from
the activations alone, the index shows what its features respond to, and one of them must prove in
an experiment that the model reads the concept through it.
"""

import numpy as np
import pytest

from visae.evaluation.card import evaluate
from visae.features.build import build_index
from visae.features.config import IndexConfig
from visae.interventions.spec import ControlsConfig, DosesConfig, FixedFeature
from visae.reports.doctor import examine
from visae.reports.workspace import write_report
from visae.saes.checkpoint import load_sae
from visae.saes.sparsity import BatchTopK
from visae.training.config import RunConfig, TrainConfig
from visae.training.loop import train

SITE = "residual@0"


@pytest.fixture(scope="module")
def lab(make_planted_lab, tmp_path_factory):
    """The planted lab with two trained SAEs, an index of the discovery side and an experiment."""
    lab = make_planted_lab(tmp_path_factory.mktemp("end to end") / "workspace")
    runs = [
        RunConfig(
            name=f"seed{seed}",
            n_features=32,
            sparsity=BatchTopK(k=1),
            matryoshka=False,
            seed=seed,
        )
        for seed in (0, 1)
    ]
    # An order of the tokens in which one feature takes the concept; in others, two share it.
    config = TrainConfig(n_tokens=60_000, batch_size=256, data_seed=3)
    train(lab.store, SITE, runs, lab.folder / "saes", config=config)
    lab.trained = lab.folder / "saes" / "seed0"
    lab.index = build_index(
        lab.trained,
        lab.store,
        lab.folder / "features" / "seed0@planted",
        config=IndexConfig(side="discovery"),
    )
    lab.result = lab.run("red", experiment(lab))
    return lab


def experiment(lab, **changes):
    settings = {
        "sae": lab.trained,
        "controls": ControlsConfig(n_random=39, n_matched=20),
        "doses": DosesConfig(suppression=(-1.0, 0.0, 0.5, 1.0), insertion=(0.0, 1.0, 2.0)),
    }
    return lab.spec(**settings | changes)


def test_the_sae_learns_and_beats_its_nulls(lab):
    card = evaluate(
        lab.trained,
        lab.store,
        model=lab.model,
        source=lab.store.source(),
        others=[load_sae(lab.folder / "saes" / "seed1")],
    )
    card.write(lab.trained)
    nmse = card.row("nmse")
    assert nmse.value.value < 0.5 * min(null.value for null in nmse.nulls.values())


def test_the_index_shows_the_concept_where_it_is(lab):
    """The feature's heat maps on its top examples peak at the planted patch."""
    feature = lab.result.selection.feature
    red, _ = lab.patch_colours()
    position = {ref: row for row, ref in enumerate(lab.store.images.refs)}
    examples = lab.index.examples(feature)["top"]
    assert len(examples) > 3
    for example in examples:
        row = position[lab.index.images.refs[example.image_row]]
        peak = int(lab.index.heat_map(feature, example.image_row).flatten().argmax())
        assert bool(red[row, peak])
    best = lab.index.row(feature)
    assert best.best_class == "red"
    assert best.best_class_lift == pytest.approx(
        len(lab.index.images) / lab.index.images.labels.count("red"), rel=0.1
    )


def test_the_planted_concept_is_found_and_supported(lab):
    result = lab.result
    assert result.status == "confirmatory"
    assert result.selection.confirmation_score > 0.95
    assert result.verdict.label == "supported"
    assert result.effect.value < -0.1
    own, other = result.classes
    assert own.n_images_changed > 0.9 * own.n_images
    assert abs(other.outcome_change.value) < 0.2 * abs(own.outcome_change.value)


def test_the_outcome_follows_the_dose(lab):
    suppression, insertion = lab.result.dose_curves
    for curve in (suppression, insertion):
        assert curve.rho.value > 0.8
        assert np.all(np.diff([change.value for change in curve.changes]) >= -1e-6)
    assert suppression.changes[1].value < 2 * suppression.control_changes[1].value < 0


def test_no_other_common_feature_passes_for_it(lab):
    """Features of the background, on images of both classes alike: none is supported."""
    rows = [lab.index.row(feature) for feature in range(32)]
    plain = [row for row in rows if row.best_class is None]
    plain.sort(key=lambda row: -row.n_images_active)
    assert plain[2].n_images_active > 20
    for feature in (row.feature for row in plain[:3]):
        rule = FixedFeature(feature=feature, chosen_from=lab.index.folder)
        doses = DosesConfig(suppression=(), insertion=())
        result = lab.run(f"plain {feature}", experiment(lab, selection=rule, doses=doses))
        assert result.status == "confirmatory"
        assert result.verdict.label != "supported"


def test_the_report_shows_the_verdict_and_the_doctor_is_content(lab):
    text = write_report(lab.folder / "experiments" / "red", lab.folder / "report").read_text()
    assert lab.result.hypothesis in text
    assert "its controls the edit changes the outcome by" in text
    assert all(finding.is_fine for finding in examine(lab.folder))


def test_everything_is_as_good_in_another_place(lab, tmp_path):
    """A workspace is moved as a whole: every path in it is relative."""
    moved = lab.folder.rename(tmp_path / "moved")
    try:
        assert all(finding.is_fine for finding in examine(moved))
        assert write_report(moved / "experiments" / "red", tmp_path / "report").is_file()
    finally:
        moved.rename(lab.folder)
