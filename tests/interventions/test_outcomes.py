"""The table of outcomes: every logit, bit for bit, under the name of its condition."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from visae.errors import ExperimentError
from visae.images.catalog import ImageTable
from visae.interventions.controls import ControlFamily
from visae.interventions.effects import Effects
from visae.interventions.outcomes import MeasuredImages, read_outcomes, write_outcomes

IMAGES = ImageTable(
    content_ids=("x", "y", "z"), refs=("0", "1", "2"), labels=("a", None, "b"), groups=(None,) * 3
)
FAMILIES = [
    ControlFamily("random directions", torch.eye(2), ()),
    ControlFamily("matched features", torch.eye(2)[:1], (17,)),
]


def effects(rows, n_draws, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n = len(rows)
    return Effects(
        rows=torch.tensor(rows),
        baseline=torch.randn(n, 4, generator=generator),
        edited=torch.randn(n, 4, generator=generator),
        controls=torch.randn(n, n_draws, 4, generator=generator),
        relative_norm=torch.ones(n),
        n_changed=torch.ones(n).long(),
        n_off_distribution=torch.zeros(n).long(),
    )


@pytest.fixture
def written(tmp_path):
    target, others = effects([2, 0], 3), effects([1], 0, seed=1)
    parts = [MeasuredImages("target", target, FAMILIES), MeasuredImages("others", others, [])]
    write_outcomes(tmp_path / "outcomes.parquet", IMAGES, list("abcd"), parts)
    return tmp_path / "outcomes.parquet", target, others


def test_every_logit_is_there(written):
    path, target, others = written
    found = read_outcomes(path)
    assert found.classes == ("a", "b", "c", "d")
    rows = found.table.to_pylist()
    assert len(rows) == 2 * 5 + 2
    names = ["baseline", "edit", "random directions:0", "random directions:1"]
    names.append("matched features:17")
    for i, row in enumerate((2, 0)):
        values = [target.baseline[i], target.edited[i], *target.controls[i]]
        for name, value, line in zip(names, values, rows[5 * i : 5 * i + 5], strict=True):
            assert (line["measurement"], line["condition"]) == ("target", name)
            assert (line["row"], line["content_id"]) == (row, IMAGES.content_ids[row])
            assert line["label"] == IMAGES.labels[row]
            assert torch.equal(torch.tensor(line["logits"]), value)
    assert [line["condition"] for line in rows[10:]] == ["baseline", "edit"]
    assert (rows[10]["measurement"], rows[10]["label"], rows[10]["row"]) == ("others", None, 1)
    assert torch.equal(torch.tensor(rows[11]["logits"]), others.edited[0])
    logits = found.logits("target")
    assert list(logits) == names
    assert torch.equal(torch.from_numpy(logits["edit"]), target.edited)
    assert torch.equal(torch.from_numpy(logits["matched features:17"]), target.controls[:, 2])
    assert found.logits("nothing") == {}


def test_a_damaged_table_is_refused(written):
    path, *_ = written
    data = bytearray(path.read_bytes())
    for spoilt in (data[:-20], data[: len(data) // 2], b""):
        path.write_bytes(spoilt)
        with pytest.raises(ExperimentError, match="missing or damaged"):
            read_outcomes(path)
    data[60] ^= 255
    path.write_bytes(data)
    with pytest.raises(ExperimentError):
        read_outcomes(path)
    path.unlink()
    with pytest.raises(ExperimentError, match="missing or damaged"):
        read_outcomes(path)


def test_another_table_is_refused(tmp_path):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(ExperimentError, match="not visae's table"):
        read_outcomes(tmp_path / "other.parquet")
