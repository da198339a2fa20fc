"""Publishing an SAE: what is sent, what is left out, and that it loads again."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from visae.activations.store import ActivationStore
from visae.errors import CheckpointError
from visae.evaluation.card import evaluate
from visae.evaluation.config import EvaluateConfig
from visae.reports.push import PushConfig, push_sae
from visae.reports.workspace import write_report
from visae.saes.checkpoint import load_sae, read_sae_record, save_sae
from visae.saes.hub import find_sae
from visae.saes.sae import SAE
from visae.storage import hub

# the hub client's own, when it uploads
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TO = "hf://ada/saes/red"


@pytest.fixture(scope="module")
def report(planted_lab):
    """The report card of the planted SAE."""
    config = EvaluateConfig(n_resamples=1000, n_permutations=20, n_class_images=40)
    return evaluate(planted_lab.sae_dir, ActivationStore(planted_lab.store.folder), config=config)


@pytest.fixture
def own_sae(planted_lab, tmp_path):
    """A folder with the planted SAE, to be changed: gives what saves it, with changes."""

    def save(sae=None, **changes):
        record = read_sae_record(planted_lab.sae_dir)
        x = planted_lab.store.shard("residual@0", 0, "patches").activations.flatten(0, 1)
        provenance = dataclasses.replace(record.provenance, **changes)
        folder = tmp_path / "saes" / "mine"
        save_sae(sae or planted_lab.sae, folder, provenance=provenance, reference=x, metrics={})
        return folder

    return save


def published(model_hub, name="ada/saes"):
    return model_hub.repositories[name].files


def test_what_is_published_loads_anywhere(model_hub, planted_lab):
    pushed = push_sae(planted_lab.sae_dir, TO)
    loaded = load_sae(TO)
    assert torch.equal(loaded.W_dec, planted_lab.sae.W_dec)
    assert find_sae(TO).place == pushed.place
    assert read_sae_record(TO) == read_sae_record(planted_lab.sae_dir)
    assert set(published(model_hub)) == {
        ".gitattributes",
        "README.md",
        "red/README.md",
        "red/sae.json",
        "red/sae.safetensors",
    }
    assert pushed.files == ("red/sae.json", "red/sae.safetensors", "red/README.md")
    assert model_hub.repositories["ada/saes"].messages == ["initial commit", "Publish SAE red"]


def test_the_page_s_code_loads_it(model_hub, planted_lab):
    push_sae(planted_lab.sae_dir, TO)
    (code,) = re.findall(
        r"```python\n(.*?)```", published(model_hub)["red/README.md"].decode(), re.S
    )
    names = {"activations": torch.randn(3, 16)}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102
    assert names["codes"].shape == (3, 24)
    assert names["reconstruction"].shape == (3, 16)


def test_a_whole_repository_for_one_sae(model_hub, planted_lab):
    push_sae(planted_lab.sae_dir, "hf://ada/red")
    files = published(model_hub, "ada/red")
    assert {"README.md", "sae.json", "sae.safetensors"} <= set(files)
    assert 'load_sae("hf://ada/red")' in files["README.md"].decode()
    assert model_hub.cards  # the hub was asked whether it can read the page's header


def test_training_files_stay_at_home(model_hub, own_sae):
    folder = own_sae()
    (folder / "resume").mkdir()
    (folder / "resume" / "state.safetensors").write_bytes(b"state")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"note": "/home/ada/x"}\n')
    (folder / "notes.txt").write_text("private")
    push_sae(folder, TO)
    assert {n.removeprefix("red/") for n in published(model_hub) if n.startswith("red/")} == {
        "README.md",
        "sae.json",
        "sae.safetensors",
    }
    pushed = push_sae(folder, TO, config=PushConfig(metrics_log=True))
    assert published(model_hub)["red/metrics.jsonl"] == b'{"step": 1}\n{"note": "x"}\n'
    assert pushed.redacted == ("metrics.jsonl [1]",)
    push_sae(folder, TO)
    assert "red/metrics.jsonl" not in published(model_hub)


def test_nothing_published_tells_of_this_machine(model_hub, own_sae, planted_lab, report):
    model = dataclasses.replace(planted_lab.store.record.identity, name="/home/ada/secret/vit")
    recipe = {"images": "seg:/home/ada/secret/camvid?ignore=11", "files": ["/home/ada/secret/a"]}
    folder = own_sae(model=model, recipe=recipe, images="/home/ada/secret/photos")
    own = dataclasses.replace(report, sae="/home/ada/secret/saes/mine")
    own.write(folder)
    pushed = push_sae(folder, TO)
    assert all(b"/home" not in content for content in published(model_hub).values())
    assert all(b"secret" not in content for content in published(model_hub).values())
    made = read_sae_record(TO).provenance
    assert (made.model.name, made.images) == ("vit", "photos")
    assert made.recipe == {"images": "seg:camvid?ignore=11", "files": ["a"]}
    assert pushed.redacted == (
        "sae.json provenance.model.name",
        "sae.json provenance.images",
        "sae.json provenance.recipe.images",
        "sae.json provenance.recipe.files[0]",
        "report_card.json sae",
    )
    load_sae(TO)
    assert "/home/ada/secret/vit" in (folder / "sae.json").read_text()


def test_the_report_card_goes_along(model_hub, own_sae, report):
    folder = own_sae()
    report.write(folder)
    push_sae(folder, TO)
    assert json.loads(published(model_hub)["red/report_card.json"])["kind"] == "report card"
    page = published(model_hub)["red/README.md"].decode()
    assert "| NMSE ↓ |" in page
    (folder / "report_card.json").unlink()
    push_sae(folder, TO)
    assert "red/report_card.json" not in published(model_hub)
    assert "without a report card" in published(model_hub)["red/README.md"].decode()


def test_a_report_is_written_from_the_hub(model_hub, own_sae, report, tmp_path):
    folder = own_sae()
    report.write(folder)
    push_sae(folder, TO)
    page = write_report(Path(TO), tmp_path / "report")
    assert "NMSE" in page.read_text()


def test_the_report_card_of_another_sae_is_not_published(model_hub, own_sae, planted_lab, report):
    other = SAE(planted_lab.sae.config)
    other.threshold.fill_(1.0)
    folder = own_sae(other)
    report.write(folder)
    with pytest.raises(CheckpointError, match=r"report card here is of another.*visae evaluate"):
        push_sae(folder, TO)
    assert model_hub.repositories == {}


def test_a_page_written_by_hand_can_be_kept(model_hub, planted_lab):
    push_sae(planted_lab.sae_dir, TO)
    model_hub.repositories["ada/saes"].commit({"red/README.md": b"by hand"}, "edit")
    push_sae(planted_lab.sae_dir, TO, config=PushConfig(keep_page=True))
    assert published(model_hub)["red/README.md"] == b"by hand"
    push_sae(planted_lab.sae_dir, TO)
    assert published(model_hub)["red/README.md"] != b"by hand"


def test_the_page_of_a_collection_is_left_alone(model_hub, planted_lab):
    push_sae(planted_lab.sae_dir, TO)
    assert b"hf://ada/saes/FOLDER" in published(model_hub)["README.md"]
    model_hub.repositories["ada/saes"].commit({"README.md": b"ours"}, "edit")
    push_sae(planted_lab.sae_dir, "hf://ada/saes/blue")
    assert published(model_hub)["README.md"] == b"ours"
    assert torch.equal(load_sae(TO).W_dec, load_sae("hf://ada/saes/blue").W_dec)


def test_what_the_page_says_of_the_licence_and_the_data(model_hub, own_sae):
    folder = own_sae(images="hf://ada/photos:train?revision=main")
    config = PushConfig(license="cc-by-4.0", datasets=("ada/more",), private=True)
    push_sae(folder, TO, config=config)
    page = published(model_hub)["red/README.md"].decode()
    header = page.split("---")[1]
    assert "license: cc-by-4.0" in header
    assert "- ada/more\n- ada/photos\n" in header
    assert "library_name: visae" in header
    assert model_hub.repositories["ada/saes"].private


def test_a_damaged_sae_is_not_published(model_hub, own_sae):
    folder = own_sae()
    (folder / "sae.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="bytes instead of"):
        push_sae(folder, TO)
    with pytest.raises(CheckpointError, match="no SAE here"):
        push_sae(folder.parent, TO)
    assert model_hub.requests == []


@pytest.mark.parametrize(
    ("to", "said"),
    [
        ("ada/saes", "no place on the model hub"),
        ("hf://ada", "no place on the model hub"),
        ("hf://ada/saes/residual@9/first@main", "no place on the model hub"),
        ("hf://ada/saes@v1.0", r"becomes the newest state.*Leave @v1\.0 out"),
    ],
)
def test_a_place_of_another_form_is_refused(model_hub, planted_lab, to, said):
    with pytest.raises(CheckpointError, match=said):
        push_sae(planted_lab.sae_dir, to)
    assert model_hub.requests == []


def test_without_a_hub_nothing_is_published(model_hub, planted_lab, monkeypatch):
    monkeypatch.setattr(hub, "_answers", lambda _endpoint: False)
    with pytest.raises(CheckpointError, match="cannot be reached, and nothing was published"):
        push_sae(planted_lab.sae_dir, TO)


def test_an_sae_of_the_hub_is_published_elsewhere(model_hub, planted_lab):
    push_sae(planted_lab.sae_dir, TO)
    push_sae(TO, "hf://ada/copies/red")
    assert (
        published(model_hub, "ada/copies")["red/sae.json"] == published(model_hub)["red/sae.json"]
    )
