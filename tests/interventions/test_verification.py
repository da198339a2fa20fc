"""A finished experiment whose files do not agree is found out."""

import json
import shutil

import pyarrow.parquet as pq
import pytest

from visae.errors import ExperimentError, VisaeError
from visae.interventions.verification import verify_experiment


@pytest.fixture(scope="module")
def original(planted_lab):
    result = planted_lab.run("verified")
    return planted_lab.folder / "experiments" / "verified", result


@pytest.fixture
def copy(original, tmp_path):
    shutil.copytree(original[0], tmp_path / "copy")
    return tmp_path / "copy"


def alter(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_files_that_agree(original):
    folder, result = original
    assert verify_experiment(folder) == result


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r["effect"].update(value=-0.9), "agree with its outcomes"),
        (lambda r: r.update(n_images=99), "agree with its outcomes"),
        (lambda r: r["controls"][0]["mean_effects"].__setitem__(3, 0.5), "its outcomes"),
        (lambda r: r["controls"][1]["members"].__setitem__(0, 77), "its outcomes"),
        (lambda r: r.update(spec_sha256="0" * 64), "agree with its registration"),
        (lambda r: r.update(store_digest="0" * 64), "agree with its spec"),
    ],
)
def test_an_altered_result(copy, change, said):
    alter(copy / "result.json", change)
    with pytest.raises(ExperimentError, match=said):
        verify_experiment(copy)


def test_an_altered_registration(copy):
    alter(copy / "registration.json", lambda r: r["spec"].update(name="other"))
    with pytest.raises(ExperimentError, match="registration was altered"):
        verify_experiment(copy)


def test_an_altered_spec(copy):
    path = copy / "spec.toml"
    path.write_text(path.read_text().replace("smallest_effect = 0.02", "smallest_effect = 0.01"))
    with pytest.raises(ExperimentError, match="agree with its spec"):
        verify_experiment(copy)


def test_altered_outcomes(copy):
    path = copy / "outcomes.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 600), path)
    with pytest.raises(ExperimentError, match="outcomes"):
        verify_experiment(copy)
    pq.write_table(table.slice(table.num_rows - 3), path)
    with pytest.raises(ExperimentError, match="agree with its outcomes"):
        verify_experiment(copy)
    metadata = {b"visae": b'{"kind": "outcomes", "format": 1, "classes": ["blue"]}'}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    with pytest.raises(ExperimentError, match="agree with its outcomes"):
        verify_experiment(copy)


@pytest.mark.parametrize(
    "name", ["result.json", "registration.json", "spec.toml", "outcomes.parquet"]
)
def test_a_missing_or_cut_file(copy, name):
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(VisaeError):
        verify_experiment(copy)
    (copy / name).unlink()
    with pytest.raises(VisaeError):
        verify_experiment(copy)
