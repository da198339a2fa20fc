"""The examples run, on data small enough for a test."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from visae.saes.checkpoint import load_sae

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the example of some number with arguments; gives what it prints."""

    def run(number, *arguments):
        (path,) = (path for path in EXAMPLES if path.name.startswith(f"{number:02d}_"))
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_examples_are_numbered_in_order():
    assert [int(path.name[:2]) for path in EXAMPLES] == list(range(1, len(EXAMPLES) + 1))


def test_a_group_of_saes_is_trained(run, store_of, tmp_path):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(40, 10, 8, generator=generator)
    store_of(tmp_path / "store", {"residual@0": tokens})
    out = tmp_path / "group"
    size = ("--n-tokens", 2000, "--batch-size", 50, "--expansion", 4)
    said = run(1, tmp_path / "store", out, *size)
    assert (out / "results.csv").is_file()
    assert load_sae(out / "k8-s2").n_features == 32
    (choice,) = json.loads((out / "sweep.json").read_text())["choices"]
    assert f"Chosen at residual@0: {choice['chosen']}, by the rule: the lowest NMSE" in said
    assert "k = 16: NMSE" in said
    assert len([folder for folder in out.iterdir() if folder.is_dir()]) == 10
