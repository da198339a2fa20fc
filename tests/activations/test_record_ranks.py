"""Two processes record one store: each some of its shards, with the result of one process."""

import inspect
import json

import pytest
import torch

RECORD = """
from pathlib import Path
import torch
from visae.activations.format import RecordConfig
from visae.activations.record import record
from visae.errors import VisaeError
from visae.models.config import ModelConfig

{classes}

told = []
tables = torch.load({tables!r})
if ranks.rank == 1:
    tables["mlp@1"][{spoilt}] = float("nan")
model = TableModel(tables, special=("cls", "register0"), grid=(2, 3), weights={weights})
try:
    store = record(
        NumberedImages(50, unreadable={{3, 20}}, labels={labels}),
        model,
        Path({out!r}),
        config=RecordConfig(
            sites=tuple(tables), tokens="all", dtype="bfloat16", batch_size=7, shard_bytes=1
        ),
        model_config=ModelConfig(model="test/table"),
        progress=told.append,
        ranks=ranks,
    )
    print(store.n_images, told[-1].done if told else None)
except VisaeError as error:
    print(error)
"""


@pytest.fixture
def record_by_two(tmp_path, run_ranks, tables, numbered_images, table_model):
    """Record 50 images, of which two cannot be read, by two ranks; gives what each says."""
    classes = "\n\n".join(map(inspect.getsource, (numbered_images, table_model)))
    torch.save(tables(50), tmp_path / "tables.pt")

    def run(out, *, spoilt=slice(0), weights="'0' * 64", labels="None"):
        body = RECORD.format(
            classes=classes,
            tables=str(tmp_path / "tables.pt"),
            out=str(out),
            spoilt=repr(spoilt),
            weights=weights,
            labels=labels,
        )
        return [said.strip() for said in run_ranks(body)]

    return run


def test_two_ranks_go_on_where_one_stopped(
    tmp_path, run, record_by_two, numbered_images, files, stop_after
):
    options = {"dtype": "bfloat16", "source": numbered_images(50, unreadable={3, 20})}
    run(tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "s", **options, options=stop_after(20))
    assert record_by_two(tmp_path / "s") == ["48 50", "48 None"]
    assert files(tmp_path / "s") == files(tmp_path / "whole")
    assert record_by_two(tmp_path / "s") == ["48 None", "48 None"]


def test_a_rank_that_fails_stops_the_other_and_one_process_goes_on(
    tmp_path, run, record_by_two, numbered_images, files
):
    said = record_by_two(tmp_path / "s", spoilt=18)
    reason = "The model gives NaN or infinite activations at mlp@1 for image 18"
    assert said[0].startswith(f"Rank 1 of 2 failed: {reason}")
    assert said[1].startswith(reason)
    assert not (tmp_path / "s" / "shards" / "00001.json").exists()
    source = numbered_images(50, unreadable={3, 20})
    run(tmp_path / "s", dtype="bfloat16", source=source)
    run(tmp_path / "whole", dtype="bfloat16", source=source)
    assert files(tmp_path / "s") == files(tmp_path / "whole")


def test_ranks_with_different_lists_of_images_are_refused(tmp_path, record_by_two):
    for said in record_by_two(tmp_path / "s", labels="[str(ranks.rank)] * 50"):
        assert said.startswith("Rank 1 does not record the same: another model or other images")


def test_ranks_with_different_weights_are_refused(tmp_path, record_by_two):
    for said in record_by_two(tmp_path / "s", weights="str(ranks.rank) * 64"):
        assert said.startswith("Rank 1 does not record the same: another model or other images")
    assert json.loads((tmp_path / "s" / "store.json").read_text())["contents"] is None
