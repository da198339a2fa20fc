"""Registrations: written once, and every departure from them is told."""

import dataclasses
import json

import pytest

from visae.errors import ExperimentError
from visae.images.catalog import ImageTable
from visae.interventions.discovery import Selection
from visae.interventions.registry import (
    check_registration,
    labels_digest,
    read_registration,
    register,
)
from visae.storage.hashing import hash_json

IMAGES = ImageTable(
    content_ids=tuple(f"id{i}" for i in range(8)),
    refs=tuple(str(i) for i in range(8)),
    labels=("a", "b", None, "a", "b", "a", None, "b"),
    groups=(None,) * 8,
)
SETTINGS = {"name": "x", "edit": {"operation": "ablate", "value": 0.0}, "sae": "s"}
SELECTION = Selection(
    feature=3,
    rule="best",
    n_candidates=10,
    score=0.9,
    runner_up=4,
    runner_up_score=0.8,
    image_ids=("id0", "id1", "id2", "id3"),
)


def go(out, *, settings=SETTINGS, selection=SELECTION, images=IMAGES, rows=(4, 5, 6, 7), **kw):
    options = {"exploratory": False} | kw
    return register(
        out,
        settings=settings,
        selection=selection,
        images=images,
        confirmation=rows,
        **options,
    )


def alter(out, **changes):
    path = out / "registration.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_registration_holds_what_was_fixed(tmp_path):
    standing = go(tmp_path / "alone")
    assert (standing.problems, standing.warnings, standing.forced) == ((), (), False)
    found = read_registration(tmp_path / "alone")
    assert found == standing.registration
    assert found.spec == SETTINGS
    assert found.spec_sha256 == hash_json(SETTINGS)
    assert (found.feature, found.selection_rule, found.n_candidates) == (3, "best", 10)
    assert found.registered_at.endswith("+00:00")
    check_registration(found, tmp_path)


def test_registering_again_changes_nothing(tmp_path):
    go(tmp_path)
    alter(tmp_path, registered_at="2020-01-01T00:00:00+00:00")
    text = (tmp_path / "registration.json").read_text()
    again = go(tmp_path)
    assert again.problems == ()
    assert again.registration.registered_at == "2020-01-01T00:00:00+00:00"
    assert (tmp_path / "registration.json").read_text() == text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"settings": SETTINGS | {"edit": {"operation": "ablate", "value": 1.0}}},
            "the spec was changed (edit.value) after the registration of 2",
        ),
        ({"settings": SETTINGS | {"sae": "t", "name": "y"}}, "changed (name, sae)"),
        (
            {"selection": dataclasses.replace(SELECTION, feature=5)},
            "the feature was 3 and is now 5",
        ),
        (
            {"selection": dataclasses.replace(SELECTION, image_ids=("id0",))},
            "the discovery images changed",
        ),
        ({"rows": (4, 5, 6)}, "the confirmation images changed"),
        (
            {"images": dataclasses.replace(IMAGES, labels=(*IMAGES.labels[:7], "a"))},
            "the labels or groups of the images changed",
        ),
        (
            {"images": dataclasses.replace(IMAGES, groups=("g", *IMAGES.groups[1:]))},
            "the labels or groups of the images changed",
        ),
    ],
)
def test_every_departure_makes_the_result_exploratory(tmp_path, changes, said):
    go(tmp_path)
    text = (tmp_path / "registration.json").read_text()
    (problem,) = go(tmp_path, **changes).problems
    assert said in problem
    assert (tmp_path / "registration.json").read_text() == text


@pytest.mark.parametrize(
    ("altered", "said"),
    [
        ({"feature": 9}, "the feature was 9 and is now 3"),
        ({"spec_sha256": "0" * 64}, "the spec was changed (its hash)"),
        ({"spec": SETTINGS | {"name": "z"}}, "the registered spec was altered"),
        ({"confirmation_digest": "0"}, "the confirmation images changed"),
        ({"discovery_digest": "0"}, "the discovery images changed"),
    ],
)
def test_an_altered_registration_makes_the_result_exploratory(tmp_path, altered, said):
    go(tmp_path)
    alter(tmp_path, **altered)
    assert any(said in problem for problem in go(tmp_path).problems)


def test_a_registration_is_checked_against_its_own_hash(tmp_path):
    go(tmp_path)
    alter(tmp_path, spec=SETTINGS | {"name": "z"})
    with pytest.raises(ExperimentError, match="registration was altered"):
        check_registration(read_registration(tmp_path), tmp_path)


@pytest.mark.parametrize("text", ["", "{", '{"kind": "sae"}', '{"kind": "registration"}'])
def test_a_damaged_registration_is_an_error_not_a_new_one(tmp_path, text):
    (tmp_path / "registration.json").write_text(text)
    with pytest.raises(ExperimentError):
        go(tmp_path)
    assert (tmp_path / "registration.json").read_text() == text


def test_a_selection_that_saw_confirmation_images_is_refused(tmp_path):
    seen = dataclasses.replace(SELECTION, image_ids=("id3", "id4", "id5"))
    with pytest.raises(ExperimentError, match="2 of the confirmation images were seen") as caught:
        go(tmp_path, selection=seen)
    assert "--side discovery" in caught.value.fix
    assert not (tmp_path / "registration.json").exists()
    standing = go(tmp_path, selection=seen, exploratory=True)
    assert standing.forced
    assert "2 confirmation images were seen by the selection" in standing.problems
    assert "it was run with --exploratory" in standing.problems


def test_a_problem_of_the_selection_is_kept(tmp_path):
    standing = go(tmp_path, selection=dataclasses.replace(SELECTION, problem="no source"))
    assert standing.problems == ("no source",)


def test_earlier_looks_at_the_same_images_are_counted(tmp_path):
    assert go(tmp_path / "a").warnings == ()
    (warning,) = go(tmp_path / "b").warnings
    assert "registered by 1 other experiment before" in warning
    assert "family_size" in warning
    go(tmp_path / "other images", rows=(4, 5))
    (warning,) = go(tmp_path / "c").warnings
    assert "registered by 2 other experiments before" in warning


def test_later_looks_are_not_held_against_the_first(tmp_path):
    go(tmp_path / "a")
    alter(tmp_path / "a", registered_at="2020-01-01T00:00:00+00:00")
    go(tmp_path / "b")
    assert go(tmp_path / "a").warnings == ()


def test_a_damaged_neighbour_does_no_harm(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "registration.json").write_text("{")
    assert go(tmp_path / "b").warnings == ()


def test_the_digest_of_labels_does_not_depend_on_order_or_place():
    order = [3, 1, 0, 2, 7, 6, 5, 4]
    turned = ImageTable(
        content_ids=tuple(IMAGES.content_ids[i] for i in order),
        refs=tuple(f"elsewhere/{i}" for i in order),
        labels=tuple(IMAGES.labels[i] for i in order),
        groups=tuple(IMAGES.groups[i] for i in order),
    )
    assert labels_digest(turned) == labels_digest(IMAGES)
