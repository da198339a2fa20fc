"""From logits to verdicts: naive formulae, and how often a null experiment is supported."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats

from visae.interventions import analysis
from visae.interventions.analysis import Measured, compare_with_controls, overall_verdict
from visae.interventions.controls import ControlFamily
from visae.interventions.effects import Effects
from visae.interventions.spec import StatisticsConfig
from visae.interventions.verdict import Prediction

SETTINGS = StatisticsConfig(n_resamples=1000, n_permutations=199)
DECREASE = Prediction(direction="decrease", smallest_effect=0.0)


def family(n_draws, name="random directions"):
    return ControlFamily(name, torch.zeros(n_draws, 2), ())


def make_effects(baseline, edited, controls, *, n_changed=None):
    n = len(baseline)
    return Effects(
        rows=torch.arange(n) + 5,
        baseline=torch.as_tensor(baseline, dtype=torch.float32),
        edited=torch.as_tensor(edited, dtype=torch.float32),
        controls=torch.as_tensor(controls, dtype=torch.float32),
        relative_norm=torch.linspace(0.1, 0.5, n),
        n_changed=torch.ones(n).long() if n_changed is None else torch.tensor(n_changed),
        n_off_distribution=torch.zeros(n).long(),
    )


def measured(effects, *, measure="logit", index=0, groups=None, settings=SETTINGS):
    return Measured(effects=effects, index=index, measure=measure, groups=groups, settings=settings)


def random_effects(n_images=20, n_draws=9, n_classes=3, *, seed=0):
    rng = np.random.default_rng(seed)
    baseline = rng.normal(0, 1, (n_images, n_classes))
    edited = baseline + rng.normal(-0.5, 0.3, (n_images, n_classes))
    controls = baseline[:, None] + rng.normal(0, 0.3, (n_images, n_draws, n_classes))
    return make_effects(baseline, edited, controls)


@pytest.mark.parametrize("measure", ["probability", "logit", "margin"])
def test_outcomes_are_read_per_image_and_draw(measure):
    effects = random_effects()
    found = measured(effects, measure=measure, index=1)

    def read(logits):
        z = np.asarray(logits, dtype=np.float64)
        if measure == "logit":
            return z[1]
        if measure == "margin":
            return z[1] - max(z[0], z[2])
        return np.exp(z[1]) / np.exp(z).sum()

    for i in range(20):
        before = read(effects.baseline[i])
        assert found.baseline[i] == pytest.approx(before, abs=1e-12)
        assert found.change[i] == pytest.approx(read(effects.edited[i]) - before, abs=1e-12)
        for draw in range(9):
            expected = read(effects.controls[i, draw]) - before
            assert found.control_changes[i, draw] == pytest.approx(expected, abs=1e-12)


def test_families_are_compared_with_their_own_draws():
    effects = random_effects(n_draws=9)
    results = compare_with_controls(
        measured(effects), [family(4), family(5, "matched features")], DECREASE
    )
    change = (effects.edited - effects.baseline)[:, 0].double().numpy()
    draws = (effects.controls - effects.baseline.unsqueeze(1))[:, :, 0].double().numpy()
    for result, part in zip(results, (draws[:, :4], draws[:, 4:]), strict=True):
        difference = change - part.mean(1)
        assert result.mean_effects == pytest.approx(part.mean(0), abs=1e-6)
        assert result.difference.value == pytest.approx(difference.mean(), abs=1e-6)
        d_z = difference.mean() / difference.std(ddof=1)
        assert result.effect_size.value == pytest.approx(d_z, rel=1e-5)
        n_reached = int((part.mean(0) <= change.mean()).sum())
        assert result.direction_p == pytest.approx((1 + n_reached) / (1 + part.shape[1]))
    assert [r.name for r in results] == ["random directions", "matched features"]


def test_p_values_are_corrected_for_the_registered_family():
    effects = random_effects()
    plain = compare_with_controls(measured(effects), [family(9)], DECREASE)[0]
    many = dataclasses.replace(DECREASE, family_size=4)
    corrected = compare_with_controls(measured(effects), [family(9)], many)[0]
    assert corrected.paired_p == pytest.approx(min(1.0, 4 * plain.paired_p))
    assert corrected.direction_p == pytest.approx(min(1.0, 4 * plain.direction_p))


def test_a_prediction_of_the_other_direction_mirrors():
    effects = random_effects()
    mirrored = make_effects(-effects.baseline, -effects.edited, -effects.controls)
    down = compare_with_controls(measured(effects), [family(9)], DECREASE)[0]
    up = compare_with_controls(
        measured(mirrored), [family(9)], Prediction(direction="increase", smallest_effect=0.0)
    )[0]
    assert up.paired_p == pytest.approx(down.paired_p)
    assert up.direction_p == pytest.approx(down.direction_p)
    assert up.verdict.label == down.verdict.label


def test_copies_and_groups_are_no_further_evidence():
    """Every image given four times: the interval of the images counted once."""
    once = random_effects(12)
    four = make_effects(
        *(
            getattr(once, name).repeat_interleave(4, 0)
            for name in ("baseline", "edited", "controls")
        )
    )
    groups = [f"{i // 4}" for i in range(48)]
    alone = compare_with_controls(measured(once), [family(9)], DECREASE)[0]
    grouped = compare_with_controls(measured(four, groups=groups), [family(9)], DECREASE)[0]
    naive = compare_with_controls(measured(four), [family(9)], DECREASE)[0]

    def width(result):
        return result.difference.interval.high - result.difference.interval.low

    assert grouped.difference.n_units == 12
    assert width(grouped) == pytest.approx(width(alone), rel=0.1)
    assert width(naive) < 0.7 * width(alone)


def test_the_weakest_family_decides():
    rng = np.random.default_rng(1)
    baseline = np.zeros((30, 2))
    edited = baseline + rng.normal([-1.0, 0], 0.1, (30, 2))
    idle = baseline[:, None] + rng.normal(0, 0.1, (30, 39, 2))
    alike = baseline[:, None] + rng.normal([-1.0, 0], 0.1, (30, 39, 2))
    effects = make_effects(baseline, edited, np.concatenate([idle, alike], 1))
    prediction = Prediction(direction="decrease", smallest_effect=0.2)
    results = compare_with_controls(
        measured(effects), [family(39), family(39, "matched features")], prediction
    )
    assert [r.verdict.label for r in results] == ["supported", "refuted"]
    assert overall_verdict(results) == results[1].verdict
    assert overall_verdict(results[::-1]) == results[1].verdict
    assert overall_verdict(results[:1]).label == "supported"


def test_a_dose_curve_has_the_naive_changes():
    parts = [measured(random_effects(seed=seed)) for seed in range(4)]
    curve = analysis.dose_curve("suppression", (-1.0, 0.0, 0.5, 2.0), parts)
    for found, own, part in zip(curve.changes, curve.control_changes, parts, strict=True):
        assert found.value == pytest.approx(part.change.mean())
        assert own.value == pytest.approx(part.control_changes.mean())
    outcomes = np.stack([part.edited for part in parts], 1)
    rhos = [stats.spearmanr((-1.0, 0.0, 0.5, 2.0), row).statistic for row in outcomes]
    assert curve.rho.value == pytest.approx(np.mean(rhos))
    assert curve.n_images == 20
    assert [size.n_images_changed for size in curve.edit_sizes] == [20] * 4


def test_the_size_of_an_edit_weighs_tokens_not_images():
    effects = dataclasses.replace(
        random_effects(3),
        relative_norm=torch.tensor([0.5, 0.1, 0.0]),
        n_changed=torch.tensor([1, 3, 0]),
        n_off_distribution=torch.tensor([1, 0, 0]),
    )
    size = analysis.edit_size(effects)
    assert size.mean_relative_norm == pytest.approx((0.5 + 3 * 0.1) / 4)
    assert (size.n_images_changed, size.n_tokens_changed) == (2, 4)
    assert size.share_off_distribution == 0.25
    nothing = dataclasses.replace(
        effects,
        relative_norm=torch.zeros(3),
        n_changed=torch.zeros(3).long(),
        n_off_distribution=torch.zeros(3).long(),
    )
    assert analysis.edit_size(nothing).mean_relative_norm == 0.0
    assert analysis.edit_size(nothing).share_off_distribution == 0.0


def test_class_changes_count_where_predictions_went():
    baseline = [[3.0, 0.0, 0.0]] * 4 + [[0.0, 3.0, 0.0]] * 2
    edited = [[3.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 3.0]] + [
        [0.0, 3.0, 0.0]
    ] * 2
    effects = make_effects(baseline, edited, np.zeros((6, 0, 3)), n_changed=[0, 1, 2, 1, 0, 0])
    found = analysis.class_change(measured(effects, index=2), 0, ["a", "b", "c"])
    assert (found.class_name, found.n_images, found.n_images_changed) == ("a", 6, 3)
    assert found.share_predictions_changed == pytest.approx(0.5)
    assert found.became == {"b": 2, "c": 1}
    assert found.outcome_change.value == pytest.approx(0.5)  # the logit of c rose by 3 once
    own = measured(effects, index=0, measure="probability")
    assert found.own_probability_change.value == pytest.approx(own.change.mean())


def test_most_and_least_affected_images_do_not_overlap():
    effects = random_effects(5)
    ids = [f"id{i}" for i in range(10)]
    most, least = analysis.image_outcomes(measured(effects), ids, ["a", "b", "c"], 3)
    size = np.abs(measured(effects).change)
    order = np.argsort(-size)
    assert [image.row - 5 for image in most] == order[:3].tolist()
    assert [image.row - 5 for image in least] == order[3:][::-1].tolist()
    assert most[0].content_id == ids[most[0].row]
    assert most[0].edited - most[0].baseline == pytest.approx(measured(effects).change[order[0]])
    assert most[0].predicted == "abc"[int(effects.baseline[order[0]].argmax())]


# Calibration of the whole procedure

N_EXPERIMENTS = 200


def simulate(rng, *, planted=0.0, n_images=30, n_draws=39):
    """Logits in which every direction, the edit's too, does something of its own to all images."""
    image = rng.normal(0, 0.5, (n_images, 1))
    direction = rng.normal(0, 0.4, n_draws + 1)
    moves = image + direction + rng.normal(0, 0.5, (n_images, n_draws + 1))
    baseline = rng.normal(0, 1, (n_images, 2))
    pushed = np.repeat(baseline[:, None], n_draws + 1, 1)
    pushed[:, :, 0] += moves
    pushed[:, 0, 0] += planted
    return make_effects(baseline, pushed[:, 0], pushed[:, 1:])


def labels_of_experiments(planted, *, smallest_effect, n_experiments=N_EXPERIMENTS):
    rng = np.random.default_rng(11)
    prediction = Prediction(direction="decrease", smallest_effect=smallest_effect)
    found = []
    for k in range(n_experiments):
        settings = dataclasses.replace(SETTINGS, seed=k)
        effects = measured(simulate(rng, planted=planted), settings=settings)
        results = compare_with_controls(effects, [family(39)], prediction)
        found.append(overall_verdict(results).label)
    return found


def test_null_experiments_are_supported_no_more_often_than_alpha():
    """Exchangeable directions: at most the upper end of the exact binomial band around α."""
    labels = labels_of_experiments(0.0, smallest_effect=0.0)
    most = stats.binom.ppf(0.975, N_EXPERIMENTS, 0.05)
    assert labels.count("supported") <= most


def test_planted_effects_are_supported():
    labels = labels_of_experiments(-2.5, smallest_effect=0.5, n_experiments=50)
    assert labels.count("supported") >= 47
