"""Specs: read strictly, written so that they mean the same, hashed by what they mean."""

import dataclasses
import math
import tomllib
from pathlib import Path

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from visae.errors import ConfigError, ExperimentError, VisaeError
from visae.interventions.spec import (
    DosesConfig,
    EditConfig,
    ExperimentSpec,
    FixedFeature,
    OutcomeConfig,
    SplitConfig,
    StatisticsConfig,
    read_spec,
    spec_hash,
    spec_settings,
    write_spec,
)
from visae.storage.hashing import hash_json
from visae.storage.records import from_plain, to_plain

MINIMAL = """
name = "red"
hypothesis = "Ablating the best red feature lowers P(red)"
sae = "../saes/first"
store = "../activations/photos"

[selection]
kind = "best-for-class"
class_name = "red"

[outcome]
class_name = "red"

[prediction]
direction = "decrease"
smallest_effect = 0.02
"""

names = st.text(min_size=1, max_size=8)
numbers = st.floats(-1e6, 1e6)
shares = st.floats(0.01, 0.99)
grids = st.lists(numbers, min_size=3, max_size=5, unique=True) | st.just([])
folders = st.sampled_from(["/a", "/a/b", "/c d/e", "/ä"])
choices = {
    "operation": ["ablate", "scale", "set", "add"],
    "unit": ["raw", "q50", "q90", "q99", "max"],
    "scope": ["patches", "active-patches", "special", "all"],
}
fixed = {"kind": st.just("feature"), "feature": st.integers(0, 10**6)}
# Plain data, for beartype draws random numbers where dataclasses are made.
plain_specs = st.fixed_dictionaries(
    {
        "name": names,
        "hypothesis": st.text(max_size=30),
        "sae": folders,
        "store": folders,
        "selection": st.fixed_dictionaries({"kind": st.just("best-for-class"), "class_name": names})
        | st.fixed_dictionaries(fixed, optional={"chosen_from": folders}),
        "edit": st.fixed_dictionaries(
            {"value": numbers} | {key: st.sampled_from(values) for key, values in choices.items()}
        ),
        "task": st.fixed_dictionaries({"site": names}),
        "outcome": st.fixed_dictionaries(
            {
                "class_name": names,
                "measure": st.sampled_from(["probability", "logit", "margin"]),
                "n_per_other_class": st.integers(0, 99),
            }
        ),
        "prediction": st.fixed_dictionaries(
            {
                "direction": st.sampled_from(["increase", "decrease"]),
                "smallest_effect": st.floats(0, 10),
                "alpha": shares,
                "family_size": st.integers(1, 99),
            }
        ),
        "controls": st.fixed_dictionaries(
            {"n_random": st.integers(1, 200), "n_matched": st.integers(0, 200)}
        ),
        "doses": st.fixed_dictionaries(
            {"suppression": grids, "insertion": grids, "n_images": st.integers(2, 500)}
        ),
        "split": st.fixed_dictionaries({"confirmation_share": shares, "salt": st.text(max_size=5)}),
        "statistics": st.fixed_dictionaries(
            {
                "seed": st.integers(0, 2**31),
                "n_resamples": st.integers(1000, 10**5),
                "n_permutations": st.integers(1, 10**5),
                "level": shares,
            }
        ),
    }
)


def write(tmp_path, text=MINIMAL, name="spec.toml"):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def hashed(spec):
    return spec_hash(spec, sae_sha256="s", store_digest="d")


@given(plain=plain_specs)
def test_a_written_spec_reads_as_the_same_spec(tmp_path_factory, plain):
    path = tmp_path_factory.getbasetemp() / "written" / "spec.toml"
    spec = from_plain(ExperimentSpec, plain)
    write_spec(spec, path)
    assert read_spec(path) == spec
    assert hashed(read_spec(path)) == hashed(spec)


def test_a_written_spec_holds_no_absolute_path_of_a_workspace(tmp_path):
    spec = read_spec(write(tmp_path / "experiments" / "red"))
    write_spec(spec, tmp_path / "experiments" / "again" / "spec.toml")
    text = (tmp_path / "experiments" / "again" / "spec.toml").read_text()
    assert str(tmp_path) not in text
    assert tomllib.loads(text)["sae"] == "../saes/first"
    assert read_spec(tmp_path / "experiments" / "again" / "spec.toml") == spec


def test_an_sae_of_the_model_hub_stays_there(tmp_path):
    text = MINIMAL.replace("../saes/first", "hf://ada/saes/first@v1.0")
    spec = read_spec(write(tmp_path, text))
    assert spec.store == (tmp_path.parent / "activations" / "photos").resolve()
    write_spec(spec, tmp_path / "deep" / "again.toml")
    written = tomllib.loads((tmp_path / "deep" / "again.toml").read_text())
    assert written["sae"] == "hf://ada/saes/first@v1.0"
    assert read_spec(tmp_path / "deep" / "again.toml") == spec


def test_paths_are_relative_to_the_file(tmp_path, monkeypatch):
    path = write(tmp_path / "a" / "b")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    spec = read_spec(path)
    assert spec.sae == tmp_path / "a" / "saes" / "first"
    assert spec.store == tmp_path / "a" / "activations" / "photos"
    fixed = MINIMAL.replace(
        'kind = "best-for-class"\nclass_name = "red"',
        'kind = "feature"\nfeature = 3\nchosen_from = "../features/first"',
    )
    assert read_spec(write(tmp_path / "a" / "b", fixed)).selection == FixedFeature(
        feature=3, chosen_from=tmp_path / "a" / "features" / "first"
    )


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("hypothesis", "hypotesis", "unknown key hypotesis (did you mean: hypothesis"),
        (
            "smallest_effect",
            "smalest_effect",
            "unknown key prediction.smalest_effect (did you mean: smallest_effect",
        ),
        ('[outcome]\nclass_name = "red"', '[outcome]\nclas_name = "red"', "outcome.clas_name"),
        ("[outcome]", "[outcom]", "unknown key outcom (did you mean: outcome"),
        ('[selection]\nkind = "best-for-class"\nclass_name = "red"', "", "selection: missing"),
        ('direction = "decrease"\n', "", "prediction.direction: missing"),
        ('"best-for-class"', '"best-for-clas"', "did you mean: best-for-class"),
        ("smallest_effect = 0.02", 'smallest_effect = "0.02"', "prediction.smallest_effect"),
        ("smallest_effect = 0.02", "smallest_effect = -0.02", "prediction"),
        ('"decrease"', '"lower"', "none of: decrease, increase"),
        ('name = "red"\nhyp', "name = 3\nhyp", "name: 3 is not text"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_the_nearest(tmp_path, old, new, said):
    assert old in MINIMAL
    path = write(tmp_path, MINIMAL.replace(old, new, 1))
    with pytest.raises(ExperimentError) as caught:
        read_spec(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("part", "settings"),
    [
        ("edit", {"value": math.nan}),
        ("edit", {"value": math.inf}),
        ("edit", {"operation": "remove"}),
        ("edit", {"unit": "q95"}),
        ("edit", {"scope": "background"}),
        ("controls", {"n_random": 0, "n_matched": 0}),
        ("controls", {"n_random": -1}),
        ("doses", {"suppression": [0.0, 1.0]}),
        ("doses", {"insertion": [1.0, 1.0, 1.0]}),
        ("doses", {"insertion": [1.0, 2.0, math.nan]}),
        ("doses", {"n_images": 1}),
        ("split", {"confirmation_share": 1.0}),
        ("split", {"confirmation_share": 0.0}),
        ("statistics", {"seed": -1}),
        ("statistics", {"n_resamples": 999}),
        ("statistics", {"n_permutations": 0}),
        ("statistics", {"level": 95.0}),
        ("outcome", {"class_name": "red", "n_per_other_class": -1}),
        ("prediction", {"direction": "decrease", "smallest_effect": 0.1, "alpha": 0.0}),
    ],
)
def test_what_could_only_fail_later_fails_when_read(tmp_path, part, settings):
    data = tomllib.loads(MINIMAL) | {part: settings}
    path = write(tmp_path, tomli_w.dumps(data))
    with pytest.raises(ExperimentError) as caught:
        read_spec(path)
    assert f"{part}" in str(caught.value)
    assert list(settings)[-1] in str(caught.value)


def test_no_curve_is_a_choice(tmp_path):
    data = tomllib.loads(MINIMAL) | {"doses": {"suppression": [], "insertion": []}}
    assert read_spec(write(tmp_path, tomli_w.dumps(data))).doses.suppression == ()


def test_settings_are_checked_in_python_too():
    for wrong in (
        lambda: EditConfig(value=math.nan),
        lambda: DosesConfig(suppression=(1.0, 2.0)),
        lambda: StatisticsConfig(n_resamples=10),
        lambda: SplitConfig(confirmation_share=2.0),
        lambda: OutcomeConfig(class_name="red", n_per_other_class=-1),
    ):
        with pytest.raises(ConfigError):
            wrong()


@pytest.mark.parametrize(("version", "fix"), [(2, "Upgrade"), (0, "format = 1")])
def test_another_format_is_refused_before_its_keys_are_read(tmp_path, version, fix):
    text = f'format = {version}\nsomething_new = "x"\n{MINIMAL}'
    with pytest.raises(ExperimentError, match=f"ormat {version}") as caught:
        read_spec(write(tmp_path, text))
    assert fix in caught.value.fix
    assert "something_new" not in str(caught.value)


def test_a_file_that_is_no_toml_or_not_there(tmp_path):
    with pytest.raises(VisaeError, match="not valid TOML"):
        read_spec(write(tmp_path, "name = "))
    with pytest.raises(VisaeError, match="no such file"):
        read_spec(tmp_path / "none.toml")
    with pytest.raises(VisaeError, match="cannot be read"):
        read_spec(tmp_path)


def test_the_hash_does_not_depend_on_places_or_order(tmp_path):
    here = read_spec(write(tmp_path / "a"))
    there = read_spec(write(tmp_path / "b" / "c", MINIMAL.replace("../saes", "/elsewhere")))
    assert here.sae != there.sae
    assert hashed(here) == hashed(there)
    tables = MINIMAL.strip().split("\n\n")
    shuffled = "\n\n".join([tables[0], *reversed(tables[1:])])
    lines = tables[0].splitlines()
    shuffled = shuffled.replace(tables[0], "\n".join(reversed(lines)))
    assert shuffled != MINIMAL
    assert hashed(read_spec(write(tmp_path / "d", shuffled))) == hashed(here)
    spelt_out = MINIMAL + '\n[edit]\noperation = "ablate"\n'
    assert hashed(read_spec(write(tmp_path / "e", spelt_out))) == hashed(here)
    index = dataclasses.replace(here, selection=FixedFeature(feature=1))
    moved = dataclasses.replace(
        here, selection=FixedFeature(feature=1, chosen_from=Path("features"))
    )
    assert hashed(index) == hashed(moved)


def test_the_hash_does_depend_on_the_sae_and_the_store(tmp_path):
    spec = read_spec(write(tmp_path))
    hashes = {spec_hash(spec, sae_sha256=sae, store_digest=store) for sae in "ab" for store in "cd"}
    assert len(hashes) == 4


def leaves(plain, path=()):
    """Every single setting of plain data: where it stands, and its value."""
    for key, value in plain.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def with_leaf(plain, path, value):
    first, *rest = path
    return plain | {first: with_leaf(plain[first], rest, value) if rest else value}


def another(path, value):
    """Another value that the setting may have."""
    if path[-1] in choices:
        return next(choice for choice in choices[path[-1]] if choice != value)
    others = {"pool": "mean-patch", "measure": "odds", "direction": "up"}
    if path[-1] in others:
        return others[path[-1]]
    if isinstance(value, list):
        return [*value, 0.123]
    return value + 1 if isinstance(value, int) else f"{value}x" if isinstance(value, str) else 0.123


def test_the_hash_changes_with_every_single_setting(tmp_path):
    """All of them: a setting that were left out could be changed after the registration."""
    settings = spec_settings(read_spec(write(tmp_path)), sae_sha256="s", store_digest="d")
    hashes = {hash_json(settings)}
    paths = [path for path, _ in leaves(settings)]
    for path, value in leaves(settings):
        hashes.add(hash_json(with_leaf(settings, path, another(path, value))))
    assert len(hashes) == 1 + len(paths)
    fields = {field.name for field in dataclasses.fields(ExperimentSpec)}
    assert {path[0] for path in paths} == fields
    assert ("doses", "n_images") in paths
    assert ("statistics", "seed") in paths


@pytest.mark.parametrize(
    ("part", "setting", "value"),
    [
        ("edit", "operation", "set"),
        ("edit", "value", 0.5),
        ("edit", "unit", "max"),
        ("edit", "scope", "all"),
        ("outcome", "measure", "margin"),
        ("prediction", "smallest_effect", 0.03),
        ("prediction", "family_size", 2),
        ("doses", "insertion", [0.0, 1.0, 3.0]),
        ("split", "salt", "other"),
        ("statistics", "seed", 1),
    ],
)
def test_the_hash_of_a_file_changes_with_its_settings(tmp_path, part, setting, value):
    data = tomllib.loads(MINIMAL)
    data[part] = data.get(part, {}) | {setting: value}
    other = read_spec(write(tmp_path, tomli_w.dumps(data)))
    assert hashed(other) != hashed(read_spec(write(tmp_path / "plain")))


def test_the_plain_form_is_all_settings(tmp_path):
    spec = read_spec(write(tmp_path))
    assert set(to_plain(spec)) == {field.name for field in dataclasses.fields(spec)}
