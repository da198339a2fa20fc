"""The page of a published SAE says what its files say, and no text in them breaks it."""

import dataclasses
import re

import pytest

from visae.models.config import ModelIdentity
from visae.models.layout import Layout
from visae.models.preprocessing import Preprocessing
from visae.reports.model_card import CardFacts, collection_card, model_card
from visae.saes.checkpoint import Provenance, SAERecord
from visae.storage.hub_path import HubPath
from visae.storage.tensors import FileRef

PROVENANCE = Provenance(
    model=ModelIdentity(name="timm/vit", title="ViT-S/16", weights_sha256="a" * 64),
    site="residual@9",
    layout=Layout(special=("cls",), grid=(14, 14)),
    preprocessing=Preprocessing(size=(224, 224)),
    tokens="patches",
    store_digest="b" * 64,
    n_tokens=2_000_000,
    seed=3,
    control="none",
    recipe={"loop": {"batch_size": 4096}},
)
RECORD = SAERecord(
    visae_version="0.1.0",
    d_model=384,
    n_features=12_288,
    sparsity={"kind": "batch-topk", "k": 32},
    prefixes=(768, 12_288),
    provenance=PROVENANCE,
    metrics={"nmse": 0.123456},
    weights=FileRef(name="sae.safetensors", n_bytes=1, sha256="c" * 64),
)
EVIL = "a|b`c<script>\n# d"


def page(record=RECORD, *, made=None, **facts):
    if made:
        record = dataclasses.replace(record, provenance=dataclasses.replace(PROVENANCE, **made))
    place = HubPath.parse("hf://ada/saes/red")
    return model_card(CardFacts(**{"place": place, "record": record} | facts))


def rows(text):
    """The tables' cells by their first one."""
    found = {}
    for line in text.splitlines():
        if line.startswith("| "):
            first, *rest = re.split(r" (?<!\\)\| ?", line.removeprefix("| "))
            found[first] = rest[:-1]
    return found


def test_the_page_says_what_the_record_says():
    found = rows(page())
    assert found["Model"] == ["`timm/vit`"]
    assert found["Model weights"] == [f"`{'a' * 64}` (visae's hash)"]
    assert found["Site"] == ["`residual@9`, width 384"]
    assert found["Tokens"] == ["patches; patch grid of 14 × 14"]
    assert found["Images"] == ["224 × 224 pixels, crop share 1, bicubic"]
    assert found["Sparsity"] == ['`batch-topk {"k": 32}`']
    assert found["Nested prefixes"] == ["768, 12288"]
    assert found["Tokens seen"] == ["2 000 000"]
    assert found["Seed"] == ["3"]
    assert found["At the end of training"] == ["nmse 0.123"]
    assert '"batch_size": 4096' in page()
    assert "12 288 features" in page()


def test_the_header_is_what_the_hub_reads():
    yaml = pytest.importorskip("yaml")
    text = page(license="apache-2.0", datasets=("ada/b", "ada/a", "ada/b"))
    header = yaml.safe_load(text.split("---\n")[1])
    assert header == {
        "library_name": "visae",
        "license": "apache-2.0",
        "tags": ["visae", "sparse-autoencoder", "interpretability", "vision"],
        "datasets": ["ada/a", "ada/b"],
    }
    assert "license" not in yaml.safe_load(page().split("---\n")[1])
    assert "## Licence\n\n`apache-2.0`" in text
    assert "Not stated" in page()


def test_a_control_is_called_one():
    assert "This is a control** (`untrained`)" in page(made={"control": "untrained"})
    assert "control**" not in page()


def test_a_transcoder_names_both_sites():
    record = dataclasses.replace(RECORD, transcoder=True)
    text = page(record, made={"target_site": "mlp@9"})
    assert "A transcoder with" in text
    assert "at `residual@9`, which gives those at `mlp@9`." in text


def test_a_kind_of_one_s_own_is_asked_for():
    text = page(needs_kind=True)
    assert 'load_sae("hf://ada/saes/red", kinds=[TheKind])' in text
    assert "`batch-topk`, does not come with visae" in text
    assert "TheKind" not in page()


def test_what_is_not_known_is_not_said():
    text = page(made={"preprocessing": None, "images": None})
    assert "Images" not in rows(text)
    assert "without a report card" in text


def test_no_text_of_a_file_breaks_out():
    evil = page(
        dataclasses.replace(RECORD, sparsity={"kind": EVIL}, visae_version=EVIL),
        made={
            "model": ModelIdentity(name=EVIL, title=EVIL, weights_sha256="a", revision=EVIL),
            "site": EVIL,
            "images": EVIL,
            "control": EVIL,
            "recipe": {"a": "```\n<script>"},
        },
        license=EVIL,
    )
    outside = re.sub(r"```.*?```", "", evil, flags=re.S).split("---\n", 2)[2]
    assert "<script>" not in outside
    assert "\n# d" not in outside
    assert evil.count("```") == page().count("```")
    assert {len(cells) for cells in rows(evil).values()} == {1}
    assert outside.count("`") % 2 == 0


def test_the_page_of_a_collection_names_no_folder():
    text = collection_card(HubPath.parse("hf://ada/saes/red@main"))
    assert "# saes\n" in text
    assert 'load_sae("hf://ada/saes/FOLDER")' in text
    assert "red" not in text
