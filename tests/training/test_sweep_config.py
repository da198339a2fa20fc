import dataclasses

import pytest

from visae.errors import ConfigError
from visae.saes.learned import Gated, JumpReLU
from visae.saes.sparsity import BatchTopK, ReLU, TopK
from visae.training.choosing import ChoiceRule
from visae.training.config import RunConfig
from visae.training.sweep_config import RunSettings, SweepConfig, read_sweep

BASE = RunSettings(n_features=48, k=3)


def runs(base=BASE, **tables):
    return SweepConfig(**tables).runs(base, lambda settings: 16)


def names(**tables):
    return [run.name for run in runs(**tables)]


def write(folder, text):
    path = folder / "sweep.toml"
    path.write_text(text)
    return path


def test_a_grid_is_every_combination_and_names_say_what_varies():
    grid = {"kind": ["topk", "batch-topk"], "k": [2, 4], "seed": [0, 1]}
    made = runs(grid=grid)
    assert [run.name for run in made] == [
        *("topk-k2-s0", "topk-k2-s1", "topk-k4-s0", "topk-k4-s1"),
        *("batch-topk-k2-s0", "batch-topk-k2-s1", "batch-topk-k4-s0", "batch-topk-k4-s1"),
    ]
    assert made[3] == RunConfig(name="topk-k4-s1", n_features=48, sparsity=TopK(k=4), seed=1)


def test_single_values_of_a_grid_are_values():
    assert names(grid={"k": 5, "seed": (0, 1)}) == ["k5-s0", "k5-s1"]


def test_runs_stand_beside_the_grid_and_may_have_lists_and_names():
    tables = [{"kind": "relu", "l1": [0.01, 0.5]}, {"name": "plain", "matryoshka": False}]
    made = runs(grid={"k": [2]}, run=tuple(tables))
    assert [run.name for run in made] == ["k2", "relu-l0.01", "relu-l0.5", "plain"]
    assert made[2].sparsity == ReLU(l1=0.5)
    assert not made[3].matryoshka
    assert made[3].sparsity == BatchTopK(k=3)


def test_every_setting_reaches_the_run():
    values = {
        "site": "blocks.3/x",
        "target_site": "mlp@3",
        "kind": "jumprelu",
        "k": 7,
        "l0_weight": 0.5,
        "expansion": 4,
        "matryoshka": True,
        "random_prefixes": 3,
        "orthogonality": 0.1,
        "learning_rate": 1e-3,
        "control": "frozen-decoder",
        "seed": 9,
    }
    (made,) = runs(RunSettings(), run=(values,))
    assert made == RunConfig(
        name="blocks.3.x-to-mlp@3-jumprelu-k7-w0.5-x4-nested-p3-o0.1-lr0.001-frozen-decoder-s9",
        n_features=64,
        site="blocks.3/x",
        target_site="mlp@3",
        sparsity=JumpReLU(target_l0=7.0, l0_weight=0.5),
        random_prefixes=3,
        orthogonality=0.1,
        learning_rate=1e-3,
        control="frozen-decoder",
        seed=9,
    )
    (other,) = runs(run=({"kind": "gated", "l1": 1, "decoder": "archetypal", "n_centroids": 8},))
    assert other.name == "gated-l1-archetypal-c8"
    assert other.sparsity == Gated(l1=1.0)
    assert other.archetypes.n_centroids == 8
    assert set(values) | {"l1", "decoder", "n_centroids", "n_features"} == {
        field.name for field in dataclasses.fields(RunSettings)
    }


def test_widths_follow_the_site():
    sweep = SweepConfig(grid={"site": ["a", "b"], "expansion": [2]})
    made = sweep.runs(RunSettings(), lambda settings: {"a": 10, "b": 20}[settings.site])
    assert [(run.name, run.n_features) for run in made] == [("a-x2", 20), ("b-x2", 40)]


def test_a_file_is_read(tmp_path):
    path = write(
        tmp_path,
        "[grid]\nk = [2, 4]\n[[run]]\nkind = 'relu'\n[choice]\nlargest_l0 = 3\n",
    )
    sweep = read_sweep(path)
    assert sweep.choice == ChoiceRule(largest_l0=3.0)
    assert [run.name for run in sweep.runs(BASE, lambda settings: 16)] == ["k2", "k4", "relu"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no SAE"),
        ("[gird]\nk = [2]", "unknown key gird.*grid"),
        ("[grid]\nk = [2]\n[choice]\nlargest_lo = 2", "choice.largest_lo.*largest_l0"),
        ("format = 2\n[nets]\na = 1", "newer than format 1"),
        ("[grid\n", "not valid TOML"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path, text, said):
    with pytest.raises(ConfigError, match=f"(?s){said}") as failure:
        read_sweep(write(tmp_path, text))
    assert failure.value.fix


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"grid": {"lerning_rate": [1e-3]}}, "lerning_rate.*did you mean: learning_rate.*grid"),
        ({"run": ({"k": 2}, {"sede": 1})}, r"sede.*did you mean: seed.*run\[1\]"),
        ({"grid": {"k": ["2"]}}, "k: '2' is not a whole number"),
        ({"grid": {"kind": ["topk", "topq"]}}, "kind: 'topq' is none of"),
        ({"grid": {"k": []}}, "k has no value"),
        ({"grid": {"k": [2, 2]}}, "named k2"),
        ({"run": ({"name": "a"}, {"name": "a", "k": 4})}, "named a"),
        ({"run": ({"name": 3},)}, "3 is not text"),
        ({"grid": {"kind": ["relu"], "k": [2, 4]}}, "relu-k2 and relu-k4 would be the same SAE"),
        ({"grid": {"n_features": [0]}}, "n_features is 0"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(tables, said):
    with pytest.raises(ConfigError, match=f"(?s){said}") as failure:
        runs(**tables)
    assert failure.value.fix
