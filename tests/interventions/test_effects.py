"""Effects: every push against a model run by hand, and batches that can be taken up again."""

import dataclasses

import pytest
import torch

from visae.errors import ExperimentError
from visae.images.source import LoadedImage
from visae.interventions.batches import take, traced_images
from visae.interventions.controls import control_families, random_directions
from visae.interventions.discovery import matched_features, profile_features
from visae.interventions.edits import Edit, plan_push, scope_tokens
from visae.interventions.effects import Condition, Effects, Laboratory, measure
from visae.interventions.spec import ControlsConfig

SITE = "residual@0"
ROWS = [1, 5, 0, 7, 3, *range(20, 40)]


class SumTask:
    """Scores that read every final token, so that nothing can change unseen."""

    classes = ("first", "second", "third")

    def logits(self, output):
        weights = torch.randn(output.tokens.shape[1], output.tokens.shape[2], 3, generator=fixed(4))
        return torch.einsum("itd,tdc->ic", output.tokens, weights)


def fixed(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def laboratory(planted_lab):
    lab = planted_lab
    return Laboratory(lab.store, lab.store.source(), lab.model, SITE, lab.sae, SumTask())


def condition(laboratory, edit, *, n=3, scope="patches", active_only=False, observed_max=2.0):
    return Condition(
        edit=edit,
        allowed=scope_tokens(laboratory.model.layout(SITE), scope),
        active_only=active_only,
        observed_max=observed_max,
        directions=random_directions(n, 16, seed=1).directions,
    )


ABLATE = Edit(feature=0, operation="ablate")


def same(a, b):
    return all(
        torch.equal(getattr(a, field.name), getattr(b, field.name))
        for field in dataclasses.fields(Effects)
    )


def test_effects_are_those_of_a_model_run_by_hand(laboratory):
    """Each image alone, pushed token by token in a plain loop, and the rest of the network run."""
    edit = Edit(feature=4, operation="add", value=1.5)
    wanted = condition(laboratory, edit, scope="all")
    found = measure(laboratory, ROWS[:4], wanted)
    lab, model = laboratory, laboratory.model
    own = lab.sae.W_dec[4] / lab.sae.W_dec[4].norm()
    for i, row in enumerate(ROWS[:4]):
        image = lab.source.load(lab.store.images.refs[row])
        pixels = model.preprocessing.pixels([model.preprocessing.view(image.pixels)])
        trace = model.trace(pixels, [SITE])
        tokens = trace.tokens[SITE]
        length = 1.5 * lab.sae.scale * lab.sae.W_dec[4].norm()
        assert torch.allclose(found.baseline[i], lab.task.logits(trace.output)[0], atol=1e-4)
        directions = [own, *wanted.directions]
        logits = [found.edited[i], *found.controls[i]]
        for direction, expected in zip(directions, logits, strict=True):
            pushed = torch.stack([token + length * direction for token in tokens[0]])
            output = model.resume(trace, SITE, pushed.unsqueeze(0))
            assert torch.allclose(expected, lab.task.logits(output)[0], atol=1e-4)
        expected_norm = (length / tokens[0].norm(dim=1)).mean()
        assert float(found.relative_norm[i]) == pytest.approx(float(expected_norm), rel=1e-5)
        assert int(found.n_changed[i]) == 17


def test_rows_keep_the_order_given(laboratory):
    found = measure(laboratory, ROWS, condition(laboratory, ABLATE))
    assert found.rows.tolist() == ROWS
    assert found.controls.shape == (len(ROWS), 3, 3)


def test_images_that_do_not_change_keep_their_baseline_bit_for_bit(laboratory, planted_lab):
    """The red feature is silent on blue images: edit and controls must do nothing there."""
    found = measure(laboratory, range(30), condition(laboratory, ABLATE))
    for i in range(30):
        is_red = planted_lab.is_red[i]
        assert bool(found.n_changed[i] == 1) == is_red
        assert bool((found.edited[i] != found.baseline[i]).any()) == is_red
        assert bool((found.controls[i] != found.baseline[i]).any()) == is_red
    assert (found.relative_norm > 0).tolist() == planted_lab.is_red[:30]


def test_an_edit_of_nothing_leaves_everything(laboratory):
    for scale in (Edit(feature=0, operation="scale", value=1.0), Edit(feature=23, operation="set")):
        found = measure(laboratory, ROWS, condition(laboratory, scale))
        assert torch.equal(found.edited, found.baseline)
        assert torch.equal(found.controls, found.baseline.unsqueeze(1).expand(-1, 3, -1))
        assert int(found.n_changed.sum()) == 0


def test_the_number_of_controls_does_not_change_the_edit(laboratory):
    """Pushes run many at a time; how they are packed must not be visible beyond rounding."""
    few = measure(laboratory, ROWS, condition(laboratory, ABLATE, n=0))
    many = measure(laboratory, ROWS, condition(laboratory, ABLATE, n=70))
    assert torch.equal(few.baseline, many.baseline)
    assert torch.allclose(few.edited, many.edited, atol=1e-4)
    assert few.controls.shape == (len(ROWS), 0, 3)


def test_off_distribution_tokens_are_counted(laboratory):
    far = Edit(feature=0, operation="set", value=4.5)
    found = measure(laboratory, ROWS[:3], condition(laboratory, far, observed_max=2.0))
    assert found.n_off_distribution.tolist() == [16, 16, 16]
    near = measure(laboratory, ROWS[:3], condition(laboratory, far, observed_max=2.3))
    assert near.n_off_distribution.tolist() == [0, 0, 0]


def test_a_batch_that_is_done_is_not_run_again(laboratory, tmp_path):
    wanted = condition(laboratory, ABLATE)
    whole = measure(laboratory, ROWS, wanted)
    told = []
    first = measure(laboratory, ROWS, wanted, partial_dir=tmp_path / "p", advance=told.append)
    assert same(whole, first)
    assert told == [0, 16, 25]
    (tmp_path / "p" / "00000016.safetensors").unlink()
    told.clear()
    again = measure(laboratory, ROWS, wanted, partial_dir=tmp_path / "p", advance=told.append)
    assert same(whole, again)
    assert told == [16, 25]


def test_what_is_left_of_other_images_is_refused(laboratory, tmp_path):
    measure(laboratory, ROWS, condition(laboratory, ABLATE), partial_dir=tmp_path)
    with pytest.raises(ExperimentError, match="effects of other images") as caught:
        measure(laboratory, ROWS[::-1], condition(laboratory, ABLATE), partial_dir=tmp_path)
    assert "Delete the folder" in caught.value.fix
    with pytest.raises(ExperimentError, match="effects of other images"):
        measure(laboratory, ROWS[:16], condition(laboratory, ABLATE), partial_dir=tmp_path)


def test_a_damaged_batch_is_refused(laboratory, tmp_path):
    measure(laboratory, ROWS, condition(laboratory, ABLATE), partial_dir=tmp_path)
    path = tmp_path / "00000000.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ExperimentError, match="not a whole safetensors"):
        measure(laboratory, ROWS, condition(laboratory, ABLATE), partial_dir=tmp_path)


def test_there_must_be_images(laboratory):
    with pytest.raises(ExperimentError, match="no images to measure"):
        measure(laboratory, [], condition(laboratory, ABLATE))


def test_an_image_that_changed_since_it_was_recorded_is_refused(laboratory):
    class Altered:
        location = "altered:"
        entries = laboratory.source.entries

        def load(self, ref):
            image = laboratory.source.load(ref)
            return LoadedImage("0" * 64, image.pixels)

    batches = traced_images(laboratory.store, Altered(), laboratory.model, SITE, [3])
    with pytest.raises(ExperimentError, match="changed since it was recorded") as caught:
        next(batches)
    assert laboratory.store.images.refs[3] in str(caught.value)


def test_traces_are_those_that_were_recorded(laboratory):
    (batch,) = traced_images(laboratory.store, laboratory.source, laboratory.model, SITE, [9, 2])
    stored = laboratory.store.shard(SITE, 0).activations[[9, 2]]
    assert batch.rows == [9, 2]
    assert torch.allclose(batch.trace.tokens[SITE], stored, atol=1e-5)


def test_taking_images_of_a_trace(laboratory):
    (batch,) = traced_images(laboratory.store, laboratory.source, laboratory.model, SITE, [9, 2])
    found = take(batch.trace, SITE, torch.tensor([1, 0, 1]))
    assert torch.equal(found.tokens[SITE], batch.trace.tokens[SITE][[1, 0, 1]])
    output = laboratory.model.resume(found, SITE, found.tokens[SITE])
    assert torch.allclose(output.tokens, batch.trace.output.tokens[[1, 0, 1]], atol=1e-5)


def test_a_site_that_resumes_from_the_pixels_gives_the_same_effects(planted_lab):
    """A module path is resumed by running everything again: the same numbers, the long way."""
    lab = planted_lab
    direction = random_directions(2, 16, seed=1).directions
    results = []
    for site in ("residual@0", "blocks.0"):
        source = lab.store.source()
        (batch,) = traced_images(lab.store, source, lab.model, site, [1, 3])
        x = batch.trace.tokens[site]
        allowed = scope_tokens(lab.model.layout(site), "patches")
        push = plan_push(lab.sae, x, ABLATE, allowed)
        copies = take(batch.trace, site, torch.tensor([0, 1]))
        moved = x + push.amounts.unsqueeze(2) * direction[0]
        results.append(lab.model.resume(copies, site, moved).tokens)
    assert torch.allclose(*results, atol=1e-5)


def test_control_families(planted_lab):
    lab = planted_lab
    rows = [i for i, side in enumerate(lab.store.images.sides()) if side == "discovery"]
    profiles = profile_features(lab.sae, lab.store, SITE, "patches", rows)
    config = ControlsConfig(n_random=11, n_matched=5)
    random, matched = control_families(lab.sae, profiles, 0, config, seed=3)
    assert random.directions.shape == (11, 16)
    assert torch.allclose(random.directions.norm(dim=1), torch.ones(11))
    assert matched.members == tuple(matched_features(profiles, 0, 5))
    assert 0 not in matched.members
    for member, direction in zip(matched.members, matched.directions, strict=True):
        row = lab.sae.W_dec[member]
        assert torch.allclose(direction, row / row.norm(), atol=1e-6)
    again = control_families(lab.sae, profiles, 0, config, seed=3)[0].directions
    assert torch.equal(random.directions, again)
    other = control_families(lab.sae, profiles, 0, config, seed=4)[0].directions
    assert not torch.equal(random.directions, other)
    only = control_families(lab.sae, profiles, 0, ControlsConfig(n_random=0, n_matched=2), seed=0)
    assert [family.name for family in only] == ["matched features"]


def test_random_directions_are_isotropic():
    directions = random_directions(4000, 3, seed=0).directions.double()
    assert float(directions.mean(0).abs().max()) < 4 * (1 / 3 / 4000) ** 0.5
    covariance = directions.T @ directions / 4000
    assert torch.allclose(covariance, torch.eye(3).double() / 3, atol=0.02)
