"""``convert`` to the model hub and back, and every other verb on an SAE of the hub."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from visae.evaluation.card import read_card
from visae.features.index import FeatureIndex
from visae.saes.checkpoint import load_sae
from visae.saes.hub import find_sae

# the hub client's own, when it uploads
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

PLACE = "hf://ada/saes/first"


@pytest.fixture
def published(model_hub, workspace, visae):
    """What the program said when it published the workspace's SAE."""
    options = ("--license", "apache-2.0", "--dataset", "ada/photos", "--private")
    code, said, error = visae("convert", workspace / "saes" / "first", "--out", PLACE, *options)
    assert code == 0, error
    return said


def test_convert_publishes(model_hub, published):
    repository = model_hub.repositories["ada/saes"]
    page = repository.files["first/README.md"].decode()
    assert repository.private
    assert "license: apache-2.0" in page
    assert "- ada/photos" in page
    assert "first/metrics.jsonl" not in repository.files
    assert "Published: first/sae.json, first/sae.safetensors, first/README.md" in published
    assert f"/ada/saes/commit/{repository.refs['main']}" in published
    assert f'load_sae("{PLACE}@{repository.refs["main"]}")' in published
    assert "Left out" not in published


def test_convert_says_what_it_left_out(model_hub, own_workspace, visae):
    sae = own_workspace / "saes" / "first"
    text = (sae / "sae.json").read_text()
    (sae / "sae.json").write_text(text.replace('"title": "', '"title": "/home/ada/'))
    code, said, _ = visae("convert", sae, "--out", PLACE)
    assert code == 0
    assert "Left out, for it tells of this machine: sae.json provenance.model.title" in said


def test_convert_copies_from_the_hub(published, visae, tmp_path):
    code, said, _ = visae("convert", PLACE, "--out", tmp_path / "theirs")
    assert code == 0
    assert f"SAE: {tmp_path / 'theirs'}, from {find_sae(PLACE).place}" in said
    load_sae(tmp_path / "theirs")


def test_convert_needs_the_hub_on_one_side(workspace, fails, tmp_path):
    said = fails("convert", workspace / "saes" / "first", "--out", tmp_path / "copy")
    assert "Both are folders" in said
    assert not (tmp_path / "copy").exists()


def test_convert_without_a_login_says_what_to_do(model_hub, workspace, fails, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "nowhere")
    assert "hf auth login" in fails("convert", workspace / "saes" / "first", "--out", PLACE)


def test_every_verb_takes_an_sae_of_the_hub(published, workspace, visae, tmp_path):
    store = workspace / "activations" / "photos"
    out = tmp_path / "features" / "theirs"
    assert visae("index", "--sae", PLACE, "--store", store, "--out", out)[0] == 0
    index = FeatureIndex(out)
    assert (index.record.sae_name, index.record.sae) == ("first", str(find_sae(PLACE).place))
    code, said, _ = visae("doctor", out)
    assert code == 0, said
    card = tmp_path / "saes" / "theirs"
    arguments = ("evaluate", "--sae", PLACE, "--store", store, "--no-fidelity")
    code, said, _ = visae(*arguments, "--out", card)
    assert code == 0
    assert read_card(card).sae == "first"
    assert f"visae index --sae {PLACE} --store {store}" in said
    assert f"--out {tmp_path / 'features' / 'first'}@photos" in said
    code, said, _ = visae("doctor", PLACE)
    assert code == 0
    assert "reproduces its reference codes" in said


def test_evaluate_writes_nothing_into_the_hub_s_cache(published, workspace, fails):
    store = workspace / "activations" / "photos"
    assert "--out" in fails("evaluate", "--sae", PLACE, "--store", store, "--no-fidelity")
    assert not (find_sae(PLACE).folder / "report_card.json").exists()


@pytest.mark.parametrize("place", ["hf://ada", "hf://ada/none", "hf://ada/saes/second"])
def test_an_sae_that_is_not_there_is_said_in_one_paragraph(published, workspace, fails, place):
    store = workspace / "activations" / "photos"
    said = fails("index", "--sae", place, "--store", store, "--out", workspace / "never")
    assert place in said
    assert not (workspace / "never").exists()


def test_the_guide_to_sharing_runs(model_hub, workspace, visae, tmp_path, monkeypatch, capsys):
    """Its commands, the publishing ones first; the tag is made in between."""
    guide = (Path(__file__).parents[2] / "docs" / "tasks" / "share.md").read_text(encoding="utf-8")
    shutil.copytree(workspace, tmp_path / "work")
    monkeypatch.chdir(tmp_path)
    use, copy, publish = re.findall(r"^```sh\n(.*?)^```", guide, re.M | re.S)
    load, python = re.findall(r"^```python\n(.*?)^```", guide, re.M | re.S)
    for line in (*publish.splitlines(), "tag", *use.splitlines(), *copy.splitlines()):
        if line == "tag":
            refs = model_hub.repositories["ada/vit-saes"].refs
            refs["v1.0"] = refs["main"]
            continue
        arguments = shlex.split(line)[1:]
        if arguments[0] == "evaluate":
            arguments.append("--no-fidelity")
        if arguments[0] == "convert" and arguments[1].startswith("hf://"):
            shutil.rmtree("work/saes/theirs")
        code, _, error = visae(*arguments)
        assert code == 0, error
    names = {}
    for code in (load, python):
        exec(compile(code, "share.md", "exec"), names)  # noqa: S102
    assert names["pushed"].redacted == ()
    assert load_sae("work/saes/again").n_features == names["sae"].n_features
