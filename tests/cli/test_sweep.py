"""``train --sweep``: many SAEs from one command, a table, a figure and a choice."""

import csv
import json

import pytest
from PIL import Image

from visae.saes.checkpoint import read_sae_record
from visae.saes.learned import Gated, JumpReLU
from visae.saes.sparsity import BatchTopK, ReLU, TopK
from visae.training.sweep_config import RunSettings

SWEEP = """
[grid]
kind = ["topk", "batch-topk"]
seed = [0, 1]

[[run]]
site = "norm"
k = 2

[[run]]
control = "untrained"

[choice]
largest_l0 = 3
largest_dead_share = 1
"""


@pytest.fixture
def store(workspace):
    return workspace / "activations" / "photos"


@pytest.fixture
def sweep(tmp_path, store):
    """Arguments of a sweep of some TOML text."""

    def arguments(text=SWEEP, *more):
        path = tmp_path / "sweep.toml"
        path.write_text(text)
        return [
            *("train", "--sweep", path, "--store", store, "--out", tmp_path / "swept"),
            *("--site", "residual@2", "--n-features", 32, "--k", 3),
            *("--n-tokens", 1500, "--batch-size", 64, *more),
        ]

    return arguments


def test_a_sweep_gives_saes_a_table_a_figure_and_a_choice(visae, sweep, tmp_path, store):
    code, said, error = visae(*sweep())
    assert code == 0, error
    out = tmp_path / "swept"
    names = ["topk-s0", "topk-s1", "batch-topk-s0", "batch-topk-s1", "norm-k2", "untrained"]
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == names
    assert [row["site"] for row in rows] == 4 * ["residual@2"] + ["norm", "residual@2"]
    assert {row["n_features"] for row in rows} == {"32"}
    assert [row["k"] for row in rows] == ["3", "3", "3", "3", "2", "3"]
    assert read_sae_record(out / "norm-k2").provenance.n_tokens == 1472
    choices = {
        c["sites"]: c["chosen"] for c in json.loads((out / "sweep.json").read_text())["choices"]
    }
    assert choices["norm"] == "norm-k2"
    assert choices["residual@2"] in names[:4]
    assert f"Chosen at residual@2: {choices['residual@2']}" in said
    assert "*: the lowest NMSE of the SAEs with L0 at most 3" in said
    assert f"visae evaluate --sae {out / choices['residual@2']} --store {store}" in said
    with Image.open(out / "pareto.png") as picture:
        assert picture.width > 1000
    assert "NMSE" in (out / "pareto.svg").read_text()
    assert visae(*sweep())[:2] == (code, said)


def test_controls_alone_have_no_figure(visae, sweep, tmp_path):
    code, said, _ = visae(*sweep("[grid]\ncontrol = ['untrained', 'random-activations']\n"))
    assert code == 0
    assert "none is within the bounds" in said
    assert not (tmp_path / "swept" / "pareto.png").exists()


def test_all_sites_can_stand_in_the_file(visae, sweep, tmp_path):
    arguments = sweep("[grid]\nsite = ['norm', 'residual@2']\n")
    place = arguments.index("--site")
    del arguments[place : place + 2]
    assert visae(*arguments)[0] == 0
    assert (tmp_path / "swept" / "norm" / "sae.json").is_file()


@pytest.mark.parametrize(
    ("text", "more", "said"),
    [
        ("[grid]\nsede = [0, 1]\n", (), "did you mean: seed"),
        ("[gird]\nseed = [0, 1]\n", (), "unknown key gird"),
        ("[grid]\nsite = ['residual@9']\n", (), "residual@9"),
        ("[grid]\nk = [64]\n", (), "k is 64 and n_features is 32"),
        (SWEEP, ("--seeds", 0, 1), "seeds of a sweep stand in its file"),
        (SWEEP, ("--memory-gb", 1e-6), "needs some"),
    ],
)
def test_a_sweep_that_cannot_be_leaves_nothing(fails, sweep, tmp_path, text, more, said):
    assert said in fails(*sweep(text, *more))
    assert not (tmp_path / "swept").exists()


def test_options_and_sweeps_make_the_same_kinds():
    kinds = {
        "topk": TopK(k=5),
        "batch-topk": BatchTopK(k=5),
        "relu": ReLU(l1=0.3),
        "gated": Gated(l1=0.3),
        "jumprelu": JumpReLU(target_l0=5.0),
    }
    for kind, sparsity in kinds.items():
        assert RunSettings(kind=kind, k=5, l1=0.3).run("a", 8).sparsity == sparsity
