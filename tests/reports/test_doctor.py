"""The doctor: good and damaged stores, SAEs, indexes and experiments, and runs that never ended."""

import json
import shutil

import pytest
import torch

from visae.errors import StoreError
from visae.features.build import build_index
from visae.features.config import IndexConfig
from visae.interventions.setup import register_experiment
from visae.interventions.spec import DosesConfig
from visae.reports.doctor import examine, examine_installation
from visae.saes.sae import SAE


@pytest.fixture(scope="module")
def healthy(make_planted_lab, tmp_path_factory):
    """A workspace with one of everything; not to be changed."""
    lab = make_planted_lab(tmp_path_factory.mktemp("doctor") / "workspace")
    build_index(
        lab.sae_dir, lab.store, lab.folder / "features" / "hand@planted", config=IndexConfig()
    )
    lab.run("red", lab.spec(doses=DosesConfig(suppression=(), insertion=())))
    return lab


@pytest.fixture
def workspace(healthy, tmp_path):
    shutil.copytree(healthy.folder, tmp_path / "workspace")
    return tmp_path / "workspace"


def bad(path):
    return [finding for finding in examine(path) if not finding.is_fine]


def spoil(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 255
    path.write_bytes(data)


def test_a_healthy_workspace(healthy):
    findings = examine(healthy.folder)
    assert all(finding.is_fine for finding in findings)
    details = {finding.what.split("/")[-1]: finding.detail for finding in findings}
    assert details["planted"].startswith("store of 80 images, every checksum right; residual@0")
    assert "norm (‖x‖ median" in details["planted"]
    assert "SAE of 24 features at residual@0 of Planted" in details["hand"]
    assert "index of 24 features on 80 images" in details["hand@planted"]
    assert details["red"] == "experiment, confirmatory: supported; its files agree"
    assert len(findings) == 4


@pytest.mark.parametrize("part", ["activations/planted", "saes/hand", "experiments/red"])
def test_a_part_alone(healthy, part):
    (finding,) = examine(healthy.folder / part)
    assert finding.is_fine


def test_a_moved_workspace_is_as_healthy(workspace):
    assert len(examine(workspace)) == 4
    assert bad(workspace) == []


@pytest.mark.parametrize(
    ("name", "part", "said"),
    [
        ("activations/planted/residual@0/00000.safetensors", "planted", "checksum"),
        ("activations/planted/images.parquet", "planted", "checksum"),
        ("activations/planted/shards.json", "planted", "checksum"),
        ("activations/planted/statistics.safetensors", "planted", "checksum"),
        ("saes/hand/sae.safetensors", "hand", "checksum"),
        ("features/hand@planted/codes/00000.safetensors", "hand@planted", "checksum"),
    ],
)
def test_one_altered_byte_is_found_in_its_place(workspace, name, part, said):
    spoil(workspace / name)
    (finding,) = bad(workspace)
    assert finding.what.endswith(part)
    assert said in finding.detail


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("activations/planted/norm/00000.safetensors", "bytes instead of"),
        ("activations/planted/store.json", "not valid JSON"),
        ("activations/planted/shards/00000.json", "not valid JSON"),
        ("saes/hand/sae.json", "not valid JSON"),
        ("features/hand@planted/index.json", "not valid JSON"),
        ("experiments/red/result.json", "not valid JSON"),
        ("experiments/red/registration.json", "not valid JSON"),
        ("experiments/red/outcomes.parquet", "missing or damaged"),
    ],
)
def test_a_file_that_was_cut_short(workspace, name, said):
    path = workspace / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    findings = bad(workspace)
    assert any(said in finding.detail for finding in findings)


def test_a_missing_shard(workspace):
    (workspace / "activations/planted/shards/00000.json").unlink()
    (finding,) = bad(workspace)
    assert "incomplete: 1 of 1 shards are missing (0)" in finding.detail
    assert "to mend it, run: visae record --images" in finding.detail


def test_an_index_of_an_sae_that_is_no_longer_there(workspace, healthy):
    """Trained again under the same name: the index shows features that do not exist any more."""
    from visae.saes.checkpoint import read_sae_record, save_sae

    other = SAE(healthy.sae.config)
    other.load_state_dict(healthy.sae.state_dict())
    with torch.no_grad():
        other.W_dec.mul_(1.1)
    reference = healthy.store.shard("residual@0", 0, "patches").activations.flatten(0, 1)
    provenance = read_sae_record(healthy.sae_dir).provenance
    save_sae(
        other, workspace / "saes" / "hand", provenance=provenance, reference=reference, metrics={}
    )
    (finding,) = bad(workspace)
    assert finding.what.endswith("hand@planted")
    assert "made from another SAE" in finding.detail
    shutil.rmtree(workspace / "saes")
    assert bad(workspace) == []


def test_an_altered_result(workspace):
    path = workspace / "experiments" / "red" / "result.json"
    result = json.loads(path.read_text())
    result["effect"]["value"] = -0.99
    path.write_text(json.dumps(result))
    (finding,) = bad(workspace)
    assert "does not agree with its outcomes" in finding.detail


def test_an_interrupted_training(workspace):
    folder = workspace / "saes" / "begun"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("{}\n")
    (finding,) = bad(workspace)
    assert (finding.what, finding.is_fine) == (str(folder), False)
    assert "run the same command again" in finding.detail


def test_an_interrupted_and_a_registered_experiment(workspace, healthy):
    out = workspace / "experiments" / "registered"
    register_experiment(healthy.spec(), out, model=healthy.model)
    assert bad(workspace) == []
    (finding,) = (f for f in examine(workspace) if f.what == str(out))
    assert "registered; its confirmation images have not been looked at" in finding.detail
    (out / "partial").mkdir()
    (finding,) = bad(workspace)
    assert "begun and not finished" in finding.detail


@pytest.mark.parametrize("name", ["nothing", "file.txt", "missing"])
def test_a_place_without_anything_of_visaes(tmp_path, name):
    (tmp_path / "nothing").mkdir()
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(StoreError, match="no store, SAE, index or experiment here"):
        examine(tmp_path / name)


def test_the_installation():
    findings = examine_installation()
    assert all(finding.is_fine for finding in findings)
    text = {finding.what: finding.detail for finding in findings}
    assert f"torch {torch.__version__.split('+')[0]}" in text["libraries"]
    assert "CPU threads" in text["device"] or "," in text["device"] or text["device"]
    assert "datasets yes" in text["extras"]
