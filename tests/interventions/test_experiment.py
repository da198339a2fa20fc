"""Whole experiments on a planted concept: the truth is found, and nothing that is not there.

Every number of a result is computed again from ``outcomes.parquet`` alone.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from sklearn.metrics import average_precision_score

from visae.errors import CheckpointError, ExperimentError, FeatureIndexError, StoreError
from visae.features.build import build_index
from visae.features.config import IndexConfig
from visae.interventions.discovery import profile_features, select
from visae.interventions.edits import Edit
from visae.interventions.experiment import run_experiment
from visae.interventions.outcomes import read_outcomes
from visae.interventions.registry import read_registration
from visae.interventions.result import ExperimentResult
from visae.interventions.setup import register_experiment
from visae.interventions.spec import (
    BestForClass,
    ControlsConfig,
    DosesConfig,
    EditConfig,
    FixedFeature,
    LinearProbeConfig,
    OutcomeConfig,
    SplitConfig,
    read_spec,
)
from visae.interventions.verdict import Prediction
from visae.storage.locks import exclusive
from visae.storage.records import read_record, to_plain

NO_DOSES = DosesConfig(suppression=(), insertion=())


@pytest.fixture(scope="module")
def finished(planted_lab):
    """The folder and result of the planted experiment; not to be changed."""
    result = planted_lab.run("planted")
    return planted_lab.folder / "experiments" / "planted", result


@pytest.fixture(scope="module")
def discovery_index(planted_lab):
    folder = planted_lab.folder / "features" / "discovery"
    build_index(
        planted_lab.sae_dir, planted_lab.store, folder, config=IndexConfig(side="discovery")
    )
    return folder


def quick(lab, **changes):
    return lab.spec(doses=NO_DOSES, **changes)


class Outcomes:
    """What an independent reader makes of ``outcomes.parquet``: plain lists and float64."""

    def __init__(self, path, class_name, measurement="target"):
        found = read_outcomes(path)
        column = found.classes.index(class_name)
        self.values, self.predicted, self.rows = {}, {}, []
        for line in found.table.to_pylist():
            if line["measurement"] != measurement:
                continue
            logits = np.array(line["logits"], dtype=np.float64)
            share = np.exp(logits - logits.max())
            value = share[column] / share.sum()
            self.values.setdefault(line["condition"], []).append(value)
            self.predicted.setdefault(line["condition"], []).append(
                found.classes[int(logits.argmax())]
            )
            if line["condition"] == "baseline":
                self.rows.append(line["row"])

    def change(self, condition):
        return np.array(self.values[condition]) - np.array(self.values["baseline"])

    def family(self, name):
        names = [c for c in self.values if c.startswith(f"{name}:")]
        return names, np.stack([self.change(c) for c in names], axis=1)


def score_on(lab, feature, side):
    """scikit-learn's average precision of a feature for red, on one side."""
    rows = [i for i, s in enumerate(lab.store.images.sides()) if s == side]
    x = lab.store.shard("residual@0", 0, "patches").activations[rows]
    largest = lab.sae.encode(x.flatten(0, 1))[:, feature].reshape(len(rows), 16).max(1).values
    return average_precision_score([lab.store.images.labels[i] == "red" for i in rows], largest)


# What is found


def test_the_planted_feature_is_found_and_supported(finished, planted_lab):
    _, result = finished
    assert result.selection.feature == 0
    assert result.selection.n_candidates == planted_lab.n_features - 1
    assert result.selection.score == pytest.approx(1.0)
    assert result.selection.confirmation_score == pytest.approx(1.0)
    assert (result.status, result.status_reasons) == ("confirmatory", ())
    assert result.verdict.label == "supported"
    assert [c.verdict.label for c in result.controls] == ["supported", "supported"]
    assert result.verdict.sentence.startswith("Supported: relative to its controls")
    assert result.probe.confirmation_accuracy > 0.8
    assert result.effect.value < -0.1


@pytest.mark.parametrize("feature", [2, 6, 11])
def test_a_feature_that_does_not_matter_is_never_supported(planted_lab, discovery_index, feature):
    selection = FixedFeature(feature=feature, chosen_from=discovery_index)
    for direction in ("decrease", "increase"):
        prediction = Prediction(direction=direction, smallest_effect=0.02)
        spec = quick(planted_lab, selection=selection, prediction=prediction)
        result = planted_lab.run(f"null {feature} {direction}", spec)
        assert result.edit_size.n_images_changed > 10
        assert result.status == "confirmatory"
        assert result.verdict.label in ("refuted", "inconclusive")
        assert score_on(planted_lab, feature, "confirmation") == pytest.approx(
            result.selection.confirmation_score
        )
        assert score_on(planted_lab, feature, "discovery") != pytest.approx(
            result.selection.confirmation_score
        )


def test_a_feature_chosen_with_shuffled_labels_is_not_supported(planted_lab, discovery_index):
    """RIGOR §3, control 6: the selection sees labels that mean nothing."""
    lab = planted_lab
    rows = [i for i, s in enumerate(lab.store.images.sides()) if s == "discovery"]
    profiles = profile_features(lab.sae, lab.store, "residual@0", "patches", rows)
    labels = [lab.store.images.labels[row] for row in rows]
    chosen = set()
    for seed in range(4):
        shuffled = np.random.default_rng(seed).permutation(labels).tolist()
        found = select(BestForClass(class_name="red"), profiles, shuffled, sae_sha256="")
        chosen.add(found.feature)
    assert chosen != {0}
    for feature in sorted(chosen - {0})[:2]:
        rule = FixedFeature(feature=feature, chosen_from=discovery_index)
        result = lab.run(f"shuffled {feature}", quick(lab, selection=rule))
        assert result.verdict.label != "supported"


def test_with_labels_that_mean_nothing_nothing_is_supported(make_planted_lab, tmp_path):
    labels = np.random.default_rng(5).permutation(["red", "blue"] * 40).tolist()
    lab = make_planted_lab(tmp_path, labels=labels)
    result = lab.run("shuffled", quick(lab))
    assert result.verdict.label != "supported"
    assert abs(result.probe.confirmation_accuracy - 0.5) < 0.3


def test_an_edit_that_changes_nothing_decides_nothing(planted_lab, discovery_index):
    """The blue feature never fires on red images."""
    rule = FixedFeature(feature=1, chosen_from=discovery_index)
    result = planted_lab.run("blue", quick(planted_lab, selection=rule))
    assert result.verdict.label == "inconclusive"
    assert result.effect.value == 0.0
    assert result.edit_size.n_tokens_changed == 0
    assert any("changes no token" in warning for warning in result.warnings)


def test_insertion_supports_the_other_direction(planted_lab):
    """The red feature, written into images of the other class, raises P(red)."""
    spec = quick(
        planted_lab,
        outcome=OutcomeConfig(class_name="blue", n_per_other_class=0),
        edit=EditConfig(operation="set", value=1.0, unit="q50", scope="all"),
    )
    result = planted_lab.run("inserted", spec)
    assert result.selection.feature == 0
    assert result.baseline.value - result.edited.value > 0.1
    assert result.edit_size.n_tokens_changed == 17 * result.n_images
    assert any("learned from patches tokens" in warning for warning in result.warnings)
    assert [change.class_name for change in result.classes] == ["blue"]


# The numbers


def test_estimates_follow_from_the_outcomes(finished):
    folder, result = finished
    found = Outcomes(folder / "outcomes.parquet", "red")
    assert len(found.rows) == result.n_images
    assert result.baseline.value == pytest.approx(np.mean(found.values["baseline"]), abs=1e-9)
    assert result.edited.value == pytest.approx(np.mean(found.values["edit"]), abs=1e-9)
    assert result.effect.value == pytest.approx(found.change("edit").mean(), abs=1e-9)
    t = stats.t.interval(0.95, result.n_images - 1, scale=stats.sem(found.change("edit")))
    width = result.effect.interval.high - result.effect.interval.low
    assert width == pytest.approx(t[1] - t[0], rel=0.3)


def test_controls_follow_from_the_outcomes(finished):
    folder, result = finished
    found = Outcomes(folder / "outcomes.parquet", "red")
    edit = found.change("edit")
    for control in result.controls:
        names, draws = found.family(control.name)
        assert control.mean_effects == pytest.approx(draws.mean(0), abs=1e-9)
        difference = edit - draws.mean(1)
        assert control.difference.value == pytest.approx(difference.mean(), abs=1e-9)
        d_z = difference.mean() / difference.std(ddof=1)
        assert control.effect_size.value == pytest.approx(d_z, rel=1e-6)
        n_reached = (draws.mean(0) <= edit.mean() + 1e-12).sum()
        assert control.direction_p == pytest.approx((1 + n_reached) / (1 + len(names)))
        signs = np.random.default_rng(9).choice([-1, 1], (20_000, len(edit)))
        paired = (1 + ((signs * difference).mean(1) <= difference.mean()).sum()) / 20_001
        assert control.paired_p == pytest.approx(paired, abs=0.02)
        members = [int(name.split(":")[1]) for name in names]
        assert list(control.members) in (members, [])
    assert len(result.controls[0].mean_effects) == 39
    assert len(result.controls[1].mean_effects) == 20
    assert result.selection.feature not in result.controls[1].members


def test_other_classes_follow_from_the_outcomes(finished):
    folder, result = finished
    found = Outcomes(folder / "outcomes.parquet", "red", "others")
    own, other = result.classes
    assert (own.class_name, other.class_name) == ("red", "blue")
    assert (own.n_images, other.n_images) == (result.n_images, 8)
    assert other.outcome_change.value == pytest.approx(found.change("edit").mean(), abs=1e-9)
    assert other.n_images_changed == 0
    target = Outcomes(folder / "outcomes.parquet", "red")
    pairs = zip(target.predicted["baseline"], target.predicted["edit"], strict=True)
    moved = [after for before, after in pairs if before != after]
    assert own.share_predictions_changed == pytest.approx(len(moved) / result.n_images)
    assert sum(own.became.values()) == len(moved)
    right = [
        np.mean([p == name for p in table.predicted["baseline"]])
        for name, table in (("red", target), ("blue", found))
    ]
    assert result.probe.confirmation_accuracy == pytest.approx(np.mean(right))
    assert result.probe.confirmation_chance == 0.5


def test_dose_curves_follow_from_the_outcomes(finished):
    folder, result = finished
    assert [curve.name for curve in result.dose_curves] == ["suppression", "insertion"]
    for curve in result.dose_curves:
        for dose, change, control, size in zip(
            curve.doses, curve.changes, curve.control_changes, curve.edit_sizes, strict=True
        ):
            found = Outcomes(folder / "outcomes.parquet", "red", f"{curve.name} {dose:g}")
            assert change.value == pytest.approx(found.change("edit").mean(), abs=1e-9)
            _, draws = found.family("random directions")
            assert draws.shape[1] == 5
            assert control.value == pytest.approx(draws.mean(), abs=1e-9)
            assert len(found.rows) == curve.n_images
            idle = (curve.name, dose) in (("suppression", 1.0), ("insertion", 0.0))
            assert (size.n_tokens_changed == 0) == idle
            below = (curve.name, dose) == ("suppression", -1.0)
            assert (size.share_off_distribution == 1.0) == below
    suppression, insertion = result.dose_curves
    assert suppression.rho.value > 0.8
    assert insertion.rho.value > 0.8
    assert suppression.changes[2].value == 0.0
    assert all(size.n_tokens_changed in (0, 8 * 16) for size in insertion.edit_sizes)


def test_a_result_says_everything_and_reads_back(finished, planted_lab):
    folder, result = finished
    assert read_record(ExperimentResult, folder / "result.json") == result
    lab, ids = planted_lab, planted_lab.store.images.content_ids
    sides = lab.store.images.sides()
    assert result.n_discovery == sides.count("discovery")
    assert result.n_confirmation == sides.count("confirmation")
    assert result.store_digest == lab.store.digest
    assert result.model.same_weights(lab.model.identity)
    registration = read_registration(folder)
    assert result.spec_sha256 == registration.spec_sha256
    assert result.registered_at == registration.registered_at
    assert (result.spec["sae"], result.spec["store"]) == ("hand", "planted")
    assert str(lab.folder) not in (folder / "result.json").read_text()
    assert str(lab.folder) not in (folder / "registration.json").read_text()
    assert str(lab.folder) not in (folder / "spec.toml").read_text()
    assert read_spec(folder / "spec.toml") == lab.spec()
    assert result.command == "visae intervene planted/spec.toml --out planted-again"
    table = read_outcomes(folder / "outcomes.parquet").table.to_pylist()
    confirmation = {ids[i] for i, side in enumerate(sides) if side == "confirmation"}
    assert {line["content_id"] for line in table} <= confirmation
    labels = {line["row"]: line["label"] for line in table}
    assert all(labels[row] == lab.store.images.labels[row] for row in labels)
    assert {image.row for image in result.most_affected} <= set(labels)
    assert not (folder / "partial").exists()


def test_each_measure_is_its_own_outcome(planted_lab, finished):
    folder, _ = finished
    for measure in ("logit", "margin"):
        spec = quick(planted_lab, outcome=OutcomeConfig(class_name="red", measure=measure))
        result = planted_lab.run(f"measured {measure}", spec)
        table = read_outcomes(folder / "outcomes.parquet")
        red = table.classes.index("red")
        values = []
        for line in table.table.to_pylist():
            if (line["measurement"], line["condition"]) == ("target", "baseline"):
                logits = line["logits"]
                values.append(logits[red] - (logits[1 - red] if measure == "margin" else 0.0))
        assert result.baseline.value == pytest.approx(np.mean(values), abs=1e-9)


def test_experiments_differ_only_by_their_seeds_randomness(planted_lab, finished):
    """Another seed draws other directions; the edit itself stays what it was, bit for bit."""
    statistics = dataclasses.replace(planted_lab.spec().statistics, seed=1)
    other = planted_lab.run("seed 1", quick(planted_lab, statistics=statistics))
    _, result = finished
    assert other.effect.value == result.effect.value
    assert other.controls[0].mean_effects != result.controls[0].mean_effects
    assert other.controls[1].mean_effects == result.controls[1].mean_effects


# Interruption and repetition


class Interrupt(Exception):  # noqa: N818
    pass


def interrupt_after(n_calls, stage="intervene"):
    seen = []

    def progress(now):
        if now.stage == stage:
            seen.append(now)
            if len(seen) == n_calls:
                raise Interrupt

    return progress


@pytest.mark.parametrize("n_calls", [1, 2, 3, 5, 8])
def test_an_interrupted_experiment_goes_on_to_the_same_result(planted_lab, finished, n_calls):
    folder, result = finished
    name = f"interrupted {n_calls}"
    with pytest.raises(Interrupt):
        planted_lab.run(name, progress=interrupt_after(n_calls))
    out = planted_lab.folder / "experiments" / name
    assert not (out / "result.json").exists()
    again = planted_lab.run(name)
    own = {"registered_at", "command", "warnings"}
    before, after = to_plain(result), to_plain(again)
    assert {k: v for k, v in before.items() if k not in own} == {
        k: v for k, v in after.items() if k not in own
    }
    table = [read_outcomes(f / "outcomes.parquet").table for f in (folder, out)]
    assert table[0].equals(table[1])


def test_an_interrupted_experiment_repeats_no_finished_batch(planted_lab, monkeypatch):
    from visae.interventions import effects

    with pytest.raises(Interrupt):
        planted_lab.run("counted", progress=interrupt_after(2))
    rows = []
    original = effects._measure_batch
    monkeypatch.setattr(
        effects,
        "_measure_batch",
        lambda lab, batch, condition: rows.append(batch.rows) or original(lab, batch, condition),
    )
    result = planted_lab.run("counted")
    target = Outcomes(
        planted_lab.folder / "experiments" / "counted" / "outcomes.parquet", "red"
    ).rows
    assert result.n_images == len(target) > 16
    assert target[:16] not in rows[:2]
    assert rows[0] == target[16:]


def test_a_finished_experiment_is_read_without_running_the_model(
    planted_lab, finished, monkeypatch
):
    folder, result = finished
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*") if path.is_file()}

    def refuse(*_args, **_options):
        raise AssertionError("the model was run")

    for name in ("trace", "resume"):
        monkeypatch.setattr(type(planted_lab.model), name, refuse)
    again = run_experiment(planted_lab.spec(), folder, model=planted_lab.model)
    assert again == result
    assert files == {p: p.stat().st_mtime_ns for p in folder.rglob("*.*") if p.is_file()}


def test_a_finished_result_is_never_overwritten(planted_lab, finished, tmp_path):
    folder, _ = finished
    out = tmp_path / "copy"
    shutil.copytree(folder, out)
    text = (out / "result.json").read_text()
    other = planted_lab.spec(edit=EditConfig(operation="scale", value=0.5))
    with pytest.raises(ExperimentError, match=r"result of another experiment \(changed: spec\)"):
        run_experiment(other, out, model=planted_lab.model)
    registration = json.loads((out / "registration.json").read_text())
    for key, said in (("labels_digest", "labels"), ("spec_sha256", "registration")):
        (out / "registration.json").write_text(json.dumps(registration | {key: "0" * 64}))
        with pytest.raises(ExperimentError, match=f"changed: .*{said}"):
            run_experiment(planted_lab.spec(), out, model=planted_lab.model)
    assert (out / "result.json").read_text() == text


def test_another_process_in_the_same_folder_is_refused(planted_lab, tmp_path):
    with exclusive(tmp_path / "x"), pytest.raises(StoreError, match="Another process"):
        run_experiment(planted_lab.spec(), tmp_path / "x", model=planted_lab.model)


def test_a_probe_can_be_shared(planted_lab, tmp_path, finished):
    spec = quick(planted_lab)
    first = planted_lab.run("shared 1", spec, probe_dir=tmp_path / "probe")
    out = planted_lab.folder / "experiments" / "shared 1"
    assert not (out / "probe").exists()
    weights = (tmp_path / "probe" / "probe.safetensors").stat().st_mtime_ns
    second = planted_lab.run("shared 2", spec, probe_dir=tmp_path / "probe")
    assert (tmp_path / "probe" / "probe.safetensors").stat().st_mtime_ns == weights
    assert first.effect == second.effect == finished[1].effect


# Registration


def test_registering_leaves_the_confirmation_images_alone(planted_lab, tmp_path):
    seen = []

    class Watched:
        entries = planted_lab.store.source().entries
        location = "watched:"

        def load(self, ref):
            seen.append(ref)
            return planted_lab.store.source().load(ref)

    out = planted_lab.folder / "experiments" / "registered"
    spec = quick(planted_lab, task=LinearProbeConfig(pool="mean-patch", site="computed"))
    registration = register_experiment(spec, out, model=planted_lab.model, source=Watched())
    sides = dict(zip(planted_lab.store.images.refs, planted_lab.store.images.sides(), strict=True))
    assert seen
    assert {sides[ref] for ref in seen} == {"discovery"}
    assert not (out / "result.json").exists()
    assert not (out / "outcomes.parquet").exists()
    result = run_experiment(spec, out, model=planted_lab.model)
    assert result.status == "confirmatory"
    assert result.registered_at == registration.registered_at


def test_a_spec_changed_after_its_registration_gives_an_exploratory_result(planted_lab):
    out = planted_lab.folder / "experiments" / "changed"
    register_experiment(quick(planted_lab), out, model=planted_lab.model)
    changed = quick(planted_lab, prediction=Prediction(direction="decrease", smallest_effect=0.0))
    result = run_experiment(changed, out, model=planted_lab.model)
    assert result.status == "exploratory"
    (reason,) = result.status_reasons
    assert "the spec was changed (prediction.smallest_effect) after the registration" in reason
    assert read_registration(out).spec["prediction"]["smallest_effect"] == 0.02
    assert run_experiment(changed, out, model=planted_lab.model) == result


def test_an_altered_registration_gives_an_exploratory_result(planted_lab):
    out = planted_lab.folder / "experiments" / "altered"
    spec = quick(planted_lab)
    register_experiment(spec, out, model=planted_lab.model)
    path = out / "registration.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"feature": 7}))
    result = run_experiment(spec, out, model=planted_lab.model)
    assert result.status == "exploratory"
    assert "the feature was 7 and is now 0" in result.status_reasons[0]


def test_labels_changed_after_the_registration_give_an_exploratory_result(
    make_planted_lab, tmp_path
):
    """Only confirmation labels: the selection is the same, but what is tested is not."""
    lab = make_planted_lab(tmp_path / "a", n_images=64)
    out = tmp_path / "out"
    register_experiment(quick(lab), out, model=lab.model)
    sides = lab.store.images.sides()
    labels = list(lab.store.images.labels)
    row = next(i for i in range(64) if sides[i] == "confirmation" and labels[i] == "red")
    labels[row] = "blue"
    other = make_planted_lab(tmp_path / "b", n_images=64, labels=labels)
    assert other.store.digest == lab.store.digest
    result = run_experiment(quick(other), out, model=lab.model)
    assert result.status == "exploratory"
    assert "labels or groups of the images changed" in result.status_reasons[0]


def test_a_feature_chosen_on_all_images_is_refused_or_exploratory(planted_lab):
    lab = planted_lab
    index = lab.folder / "features" / "all"
    build_index(lab.sae_dir, lab.store, index, config=IndexConfig(side="all"))
    spec = quick(lab, selection=FixedFeature(feature=0, chosen_from=index))
    with pytest.raises(ExperimentError, match="confirmation images were seen"):
        lab.run("seen", spec)
    result = lab.run("seen", spec, exploratory=True)
    assert result.status == "exploratory"
    assert "it was run with --exploratory" in result.status_reasons
    assert result.command.endswith("--exploratory")
    assert result.spec["selection"]["chosen_from"] == "all"


def test_a_feature_chosen_on_discovery_images_confirms(planted_lab, discovery_index, finished):
    rule = FixedFeature(feature=0, chosen_from=discovery_index)
    result = planted_lab.run("discovered", quick(planted_lab, selection=rule))
    assert result.status == "confirmatory"
    assert result.effect == finished[1].effect
    assert result.selection.n_candidates == 1


def test_a_feature_from_nowhere_is_exploratory(planted_lab):
    spec = quick(planted_lab, selection=FixedFeature(feature=0))
    result = planted_lab.run("nowhere", spec)
    assert result.status == "exploratory"
    assert "does not say from which images" in result.status_reasons[0]


def test_an_index_with_another_split_is_refused(planted_lab, discovery_index):
    rule = FixedFeature(feature=0, chosen_from=discovery_index)
    spec = quick(planted_lab, selection=rule, split=SplitConfig(salt="other"))
    with pytest.raises(ExperimentError, match="confirmation images were seen"):
        planted_lab.run("salted", spec)


def test_earlier_experiments_on_the_same_images_are_told(planted_lab):
    folder = planted_lab.folder / "family"
    first = run_experiment(quick(planted_lab), folder / "a", model=planted_lab.model)
    second = run_experiment(quick(planted_lab, name="b"), folder / "b", model=planted_lab.model)
    assert first.warnings == ()
    (warning,) = second.warnings
    assert "registered by 1 other experiment before" in warning


# Units


def test_groups_are_the_units_and_stay_whole(make_planted_lab, tmp_path):
    groups = [f"patient {i // 4}" for i in range(80)]
    lab = make_planted_lab(tmp_path, groups=groups)
    result = lab.run("grouped", quick(lab))
    rows = Outcomes(tmp_path / "experiments" / "grouped" / "outcomes.parquet", "red").rows
    n_groups = len({groups[row] for row in rows})
    assert result.effect.n_units == n_groups < result.effect.n_images == len(rows)
    assert "groups" in result.verdict.sentence
    sides = lab.store.images.sides()
    for group in set(groups):
        assert len({s for s, g in zip(sides, groups, strict=True) if g == group}) == 1


def test_copies_of_an_image_count_as_one(make_planted_lab, tmp_path, monkeypatch):
    lab = make_planted_lab(tmp_path, n_images=64)
    extra = [f"pictures/{i:03d}.png" for i in range(64)]
    for i, name in enumerate(extra):
        shutil.copy(tmp_path / name, tmp_path / "pictures" / f"copy{i:03d}.png")
    with lab.images.open("a") as file:
        for i in range(64):
            file.write(f"pictures/copy{i:03d}.png,{'red' if i % 2 else 'blue'},\n")
    shutil.rmtree(tmp_path / "activations")
    lab.store = lab._record()
    result = lab.run("copies", quick(lab))
    assert result.effect.n_images == 2 * result.effect.n_units
    assert any("occur more than once" in warning for warning in result.warnings)


# What cannot be done


def test_what_cannot_be_done_is_not_registered(planted_lab, discovery_index):
    lab = planted_lab
    cases = {
        "There is no feature 99": {"selection": FixedFeature(feature=99)},
        "Feature 23 never fires": {"selection": FixedFeature(feature=23)},
        "No discovery image has the label rde": {"selection": BestForClass(class_name="rde")},
        "No discovery image has the label reed": {"outcome": OutcomeConfig(class_name="reed")},
        "22 other features fire": {"controls": ControlsConfig(n_matched=23)},
        "does not hold the model's final": {"task": LinearProbeConfig(site="residual@0")},
        "The split leaves": {"split": SplitConfig(confirmation_share=1e-9)},
    }
    for i, (said, changes) in enumerate(cases.items()):
        with pytest.raises(ExperimentError, match=said):
            lab.run(f"impossible {i}", lab.spec(**changes))
        assert not (lab.folder / "experiments" / f"impossible {i}" / "registration.json").exists()


def test_an_index_or_sae_or_store_that_is_not_there(planted_lab, tmp_path):
    lab = planted_lab
    rule = FixedFeature(feature=0, chosen_from=tmp_path)
    with pytest.raises(FeatureIndexError):
        lab.run("no index", lab.spec(selection=rule))
    with pytest.raises(CheckpointError, match="no SAE here"):
        lab.run("no sae", lab.spec(sae=tmp_path))
    with pytest.raises(StoreError, match="no activation store"):
        lab.run("no store", lab.spec(store=tmp_path))


def test_a_scope_without_tokens_is_refused(planted_lab, monkeypatch):
    from visae.models.layout import Layout

    lab = planted_lab
    monkeypatch.setattr(
        type(lab.model), "layout", lambda self, site: Layout(special=(), grid=(4, 4))
    )
    with pytest.raises(ExperimentError, match="no special tokens"):
        lab.run("no special", lab.spec(edit=EditConfig(scope="special")))


def test_too_few_images_are_told_before_anything_is_registered(make_planted_lab, tmp_path):
    sides = ["discovery"] * 0
    lab = make_planted_lab(tmp_path / "a", n_images=64)
    sides = lab.store.images.sides()
    labels = ["red" if s == "discovery" and i % 2 else "blue" for i, s in enumerate(sides)]
    few = make_planted_lab(tmp_path / "b", n_images=64, labels=labels)
    with pytest.raises(ExperimentError, match="There are 0 confirmation images of red"):
        few.run("few", few.spec())
    assert not (tmp_path / "b" / "experiments" / "few" / "registration.json").exists()


def test_few_images_are_inconclusive(make_planted_lab, tmp_path):
    """Below six units no interval can be had: the verdict says so instead of guessing."""
    lab = make_planted_lab(tmp_path / "a", n_images=64)
    sides = lab.store.images.sides()
    red = [i for i, s in enumerate(sides) if s == "confirmation" and i % 2][4:]
    labels = ["" if i in red else "red" if i % 2 else "blue" for i in range(64)]
    few = make_planted_lab(tmp_path / "b", n_images=64, labels=labels)
    result = few.run("few", quick(few))
    assert result.n_images == 4
    assert result.verdict.label == "inconclusive"
    assert "4 independent units carry no 95 % interval" in result.verdict.sentence


def test_an_image_that_changed_on_disk_is_refused(make_planted_lab, tmp_path):
    lab = make_planted_lab(tmp_path, n_images=64)
    sides = lab.store.images.sides()
    row = [i for i, s in enumerate(sides) if s == "confirmation" and i % 2][1]
    Image.new("RGB", (16, 16), (230, 20, 20)).save(tmp_path / lab.store.images.refs[row])
    with pytest.raises(StoreError, match="not the image that was recorded") as caught:
        lab.run("changed", quick(lab))
    assert lab.store.images.refs[row] in str(caught.value)


def test_another_models_weights_are_refused(planted_lab, tiny_vit):
    with pytest.raises(ExperimentError, match="recorded from Planted with other weights") as c:
        run_experiment(planted_lab.spec(), planted_lab.folder / "x" / "y", model=tiny_vit)
    assert "Give the weights" in c.value.fix


def test_an_sae_of_another_store_is_refused(planted_lab, store_of, tmp_path):
    labels = ["red", "blue"] * 20
    other = store_of(tmp_path / "s", {"residual@0": torch.randn(40, 16, 16)}, labels=labels)
    with pytest.raises(CheckpointError, match="not made for this store"):
        planted_lab.run("other store", planted_lab.spec(store=other.folder))


# Scopes and limits


def test_active_patches_and_patches_agree_for_an_ablation(planted_lab, finished):
    spec = quick(planted_lab, edit=EditConfig(scope="active-patches"))
    result = planted_lab.run("active", spec)
    assert result.effect == finished[1].effect


def test_insertion_reaches_images_where_the_feature_is_silent(planted_lab):
    """With active-patches alone an insertion could never change anything."""
    doses = DosesConfig(suppression=(), insertion=(0.0, 1.0, 2.0))
    spec = planted_lab.spec(edit=EditConfig(scope="active-patches"), doses=doses)
    (curve,) = planted_lab.run("inserted where silent", spec).dose_curves
    assert [size.n_images_changed for size in curve.edit_sizes] == [0, 8, 8]


def test_an_edit_in_units_of_the_features_own_activations(planted_lab):
    spec = quick(planted_lab, edit=EditConfig(operation="add", value=1.0, unit="q99"))
    result = planted_lab.run("added", spec)
    assert result.edit_size.n_tokens_changed == 16 * result.n_images
    from visae.interventions import experiment
    from visae.interventions.setup import prepare_experiment

    setup = prepare_experiment(
        spec, planted_lab.folder / "experiments" / "units", model=planted_lab.model
    )
    expected = {"raw": 2.0, "q50": setup.profile.q50 * 2, "max": setup.profile.maximum * 2}
    for unit, value in expected.items():
        config = EditConfig(operation="set", value=2.0, unit=unit)
        other = dataclasses.replace(setup, spec=quick(planted_lab, edit=config))
        assert experiment._edit(other) == Edit(feature=0, operation="set", value=value)
    config = EditConfig(operation="scale", value=2.0, unit="q99")
    other = dataclasses.replace(setup, spec=quick(planted_lab, edit=config))
    assert experiment._edit(other).value == 2.0


def test_an_off_distribution_edit_is_flagged(planted_lab):
    spec = quick(planted_lab, edit=EditConfig(operation="set", value=3.0, unit="max"))
    result = planted_lab.run("far", spec)
    assert result.edit_size.share_off_distribution == 1.0
    assert any("100% of the changed tokens" in warning for warning in result.warnings)


def test_too_few_draws_are_told(planted_lab):
    spec = quick(planted_lab, controls=ControlsConfig(n_random=10, n_matched=0))
    result = planted_lab.run("few draws", spec)
    assert any(w.startswith("Random directions: 10 draws give no p") for w in result.warnings)
    assert result.verdict.label != "supported"


def test_a_class_too_small_for_the_probe_is_told(make_planted_lab, tmp_path):
    labels = ["rare" if i in (0, 2, 4) else "red" if i % 2 else "blue" for i in range(80)]
    lab = make_planted_lab(tmp_path, labels=labels)
    result = lab.run("rare", quick(lab))
    assert any("few discovery images for the probe: rare" in w for w in result.warnings)
    assert [change.class_name for change in result.classes] == ["red", "blue"]


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the hub client's own
def test_the_sae_may_be_on_the_model_hub(planted_lab, model_hub):
    from visae.reports.push import push_sae

    push_sae(planted_lab.sae_dir, "hf://ada/saes/red")
    result = planted_lab.run("hub", quick(planted_lab, sae=Path("hf://ada/saes/red")))
    out = planted_lab.folder / "experiments" / "hub"
    assert 'sae = "hf://ada/saes/red"' in (out / "spec.toml").read_text()
    assert planted_lab.run("hub", read_spec(out / "spec.toml")) == result
    assert planted_lab.run("hub", quick(planted_lab)) == result  # the same SAE by its content
