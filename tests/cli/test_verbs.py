"""Every verb through the program, each reading what the one before wrote."""

import shutil

import pytest

from visae.activations.store import ActivationStore
from visae.evaluation.card import read_card
from visae.features.index import FeatureIndex
from visae.interventions.registry import read_registration
from visae.interventions.verification import verify_experiment
from visae.saes.checkpoint import load_sae, read_sae_record


def test_record_writes_a_store_and_names_the_next_verb(visae, record_arguments, tmp_path):
    out = tmp_path / "activations" / "photos"
    code, said, _ = visae(*record_arguments(out, "--title", "Tiny"))
    assert code == 0
    store = ActivationStore(out)
    store.verify()
    assert store.sites == ["residual@2", "norm"]
    assert store.images.classes == ("blue", "red")
    assert store.record.identity.title == "Tiny"
    assert f"Recorded 48 images at residual@2, norm: {out}" in said
    next_verb = f"Next: visae train --store {out} --site residual@2 --out {tmp_path / 'saes'}/first"
    assert next_verb in said
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert visae(*record_arguments(out, "--title", "Tiny"))[0] == 0
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}


def test_record_tells_what_it_skipped(visae, home, tmp_path):
    shutil.copytree(home / "photos", tmp_path / "photos")
    (tmp_path / "photos" / "red" / "zz.png").write_bytes(b"no image")
    shutil.copy(tmp_path / "photos" / "red" / "01.png", tmp_path / "photos" / "red" / "again.png")
    arguments = [
        *("record", "--images", tmp_path / "photos", "--model", "test_vit", "--image-size", 32),
        *("--weights", home / "weights.safetensors", "--site", "residual@0", "--out"),
    ]
    code, said, _ = visae(*arguments, tmp_path / "store")
    assert code == 0
    assert f"1 images were skipped: see {tmp_path / 'store' / 'skipped.csv'}" in said
    assert "1 images occur more than once" in said
    assert "red/zz.png" in (tmp_path / "store" / "skipped.csv").read_text()


def test_train_makes_one_sae_a_seed(visae, workspace, train_arguments, tmp_path):
    store = workspace / "activations" / "photos"
    arguments = train_arguments(store, tmp_path / "saes" / "a", "--seeds", 0, 1)
    code, said, _ = visae(*arguments, "--kind", "topk", "--no-matryoshka")
    assert code == 0
    for seed in (0, 1):
        record = read_sae_record(tmp_path / "saes" / f"a-s{seed}")
        assert (record.provenance.seed, record.sparsity["kind"]) == (seed, "topk")
        assert record.prefixes == ()
        load_sae(tmp_path / "saes" / f"a-s{seed}")
    assert f"Next: visae evaluate --sae {tmp_path / 'saes' / 'a-s0'} --store {store}" in said


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("relu", {"l1": 0.02}),
        ("gated", {"l1": 0.02}),
        ("batch-topk", {"k": 3}),
        ("jumprelu", {"target_l0": 3.0}),
    ],
)
def test_train_knows_every_kind(visae, workspace, train_arguments, tmp_path, kind, settings):
    store = workspace / "activations" / "photos"
    code, *_ = visae(*train_arguments(store, tmp_path / "a", "--kind", kind, "--l1", 0.02))
    assert code == 0
    sparsity = read_sae_record(tmp_path / "a").sparsity
    assert {"kind": kind, **settings}.items() <= sparsity.items()


def test_train_passes_on_how_to_train(visae, workspace, train_arguments, tmp_path):
    store = workspace / "activations" / "photos"
    options = "--decoder archetypal --n-centroids 8 --random-prefixes 4 --orthogonality 0.1"
    code, *_ = visae(*train_arguments(store, tmp_path / "a", *options.split()))
    assert code == 0
    run = read_sae_record(tmp_path / "a").provenance.recipe["run"]
    assert run["archetypes"] == {"n_centroids": 8, "delta": 1.0}
    assert (run["random_prefixes"], run["orthogonality"]) == (4, 0.1)


def test_train_makes_a_transcoder(visae, workspace, train_arguments, tmp_path):
    store = workspace / "activations" / "photos"
    code, *_ = visae(*train_arguments(store, tmp_path / "a", "--target-site", "norm"))
    assert code == 0
    made = read_sae_record(tmp_path / "a").provenance
    assert (made.site, made.target_site) == ("residual@2", "norm")
    code, _, said = visae("evaluate", "--sae", tmp_path / "a", "--store", store)
    assert code == 2
    assert "transcoder" in said


def test_train_makes_controls(visae, workspace, train_arguments, tmp_path):
    store = workspace / "activations" / "photos"
    code, said, _ = visae(*train_arguments(store, tmp_path / "a", "--control", "untrained"))
    assert code == 0
    assert read_sae_record(tmp_path / "a").provenance.control == "untrained"
    assert f"{tmp_path / 'a'}: untrained" in said


def test_train_takes_the_only_trainable_site(visae, home, train_arguments, tmp_path):
    """A lone module path is a site too; of several, the block site is meant."""
    for name, sites in (("lone", ["blocks.1"]), ("two", ["residual@1", "norm"])):
        store = tmp_path / name
        code, *_ = visae(
            *("record", "--images", home / "photos", "--model", "test_vit", "--image-size", 32),
            *("--weights", home / "weights.safetensors", "--site", *sites, "--out", store),
        )
        assert code == 0
        arguments = [str(a) for a in train_arguments(store, tmp_path / f"{name}-sae")]
        at = arguments.index("--site")
        code, *_ = visae(*arguments[:at], *arguments[at + 2 :])
        assert code == 0
        assert read_sae_record(tmp_path / f"{name}-sae").provenance.site == sites[0]


def test_evaluate_prints_metrics_beside_nulls(visae, own_workspace):
    sae, store = own_workspace / "saes" / "first", own_workspace / "activations" / "photos"
    code, said, _ = visae("evaluate", "--sae", sae, "--store", store, "--no-fidelity")
    assert code == 0
    card = read_card(sae)
    assert f"Report card: {sae / 'report_card.json'}" in said
    assert "NMSE" in said
    assert f"{card.row('nmse').value.value:.3g}" in said
    assert "--side discovery" in said
    assert f"--out {own_workspace / 'features' / 'first'}@photos" in said


def test_evaluate_with_the_model_and_a_second_seed(visae, own_workspace, train_arguments):
    sae, store = own_workspace / "saes" / "first", own_workspace / "activations" / "photos"
    other, out = own_workspace / "saes" / "second", own_workspace / "card"
    visae(*train_arguments(store, other, "--seeds", 5))
    code, said, _ = visae("evaluate", "--sae", sae, other, "--store", store, "--out", out)
    assert code == 0
    assert not (sae / "report_card.json").exists()
    assert "spliced in" in said
    rows = {row.name: row for row in read_card(out).rows}
    assert any("stability" in name and row.value is not None for name, row in rows.items())


def test_index_of_the_discovery_side(visae, own_workspace):
    out = own_workspace / "features" / "discovery"
    sae, store = own_workspace / "saes" / "first", own_workspace / "activations" / "photos"
    code, said, _ = visae(
        "index", "--sae", sae, "--store", store, "--out", out, "--side", "discovery"
    )
    assert code == 0
    sides = ActivationStore(store).images.sides()
    assert FeatureIndex(out).n_images == sides.count("discovery")
    assert FeatureIndex(own_workspace / "features" / "first@photos").n_images == 48
    assert f"Next: visae report {out} --out {out}-report" in said


def test_intervene_report_and_doctor(visae, own_workspace):
    spec, out = own_workspace / "specs" / "red.toml", own_workspace / "experiments" / "red"
    code, said, _ = visae("intervene", spec, "--out", out)
    assert code == 0
    result = verify_experiment(out)
    assert result.hypothesis in said
    assert f"[{result.status}]" in said
    assert result.verdict.sentence in said
    assert all(warning in said for warning in result.warnings)
    assert (out / "report.html").is_file()
    assert f"Report: {out / 'report.html'}" in said

    assert visae("intervene", spec, "--out", out)[1] == said

    code, said, _ = visae("report", own_workspace, "--out", own_workspace / "report")
    assert code == 0
    assert f"Report: {own_workspace / 'report' / 'index.html'}" in said
    assert result.hypothesis in (own_workspace / "report" / "index.html").read_text()

    code, said, _ = visae("doctor", own_workspace)
    assert code == 0
    assert said.count("ok   ") == 4
    assert "BAD" not in said


@pytest.mark.usefixtures("no_page")
def test_intervene_in_two_steps(visae, own_workspace):
    spec, out = own_workspace / "specs" / "red.toml", own_workspace / "experiments" / "red"
    code, said, _ = visae("intervene", spec, "--out", out, "--register-only")
    assert code == 0
    registration = read_registration(out)
    assert f"Registered feature {registration.feature} at {registration.registered_at}" in said
    assert f"Next: visae intervene {spec} --out {out}" in said
    assert not (out / "result.json").exists()
    assert visae("intervene", spec, "--out", out)[0] == 0
    result = verify_experiment(out)
    assert (result.status, result.registered_at) == ("confirmatory", registration.registered_at)


@pytest.mark.usefixtures("no_page")
def test_what_moved_can_be_named(visae, own_workspace, home, tmp_path):
    """Photos and weights recorded elsewhere: the verbs that need them say how to give them."""
    shutil.copytree(home / "photos", tmp_path / "moved")
    shutil.copy(home / "weights.safetensors", tmp_path / "moved.safetensors")
    store = own_workspace / "activations" / "photos" / "store.json"
    text = store.read_text().replace(str(home), str(tmp_path / "gone"))
    store.write_text(text)
    spec, out = own_workspace / "specs" / "red.toml", own_workspace / "experiments" / "red"
    images = ["--images", tmp_path / "moved"]
    weights = ["--weights", tmp_path / "moved.safetensors"]
    code, _, error = visae("intervene", spec, "--out", out, *images)
    assert (code, "gone" in error) == (2, True)
    code, _, error = visae("intervene", spec, "--out", out, *weights)
    assert (code, "--images" in error) == (2, True)
    assert visae("intervene", spec, "--out", out, *images, *weights)[0] == 0


def test_doctor_fails_where_something_is_wrong(visae, own_workspace):
    path = own_workspace / "saes" / "first" / "sae.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    code, said, error = visae("doctor", own_workspace)
    assert code == 2
    assert f"BAD  {own_workspace / 'saes' / 'first'}: This file's checksum differs" in said
    assert said.count("ok   ") == 2
    assert "1 of 3 checks failed" in error


def test_doctor_of_the_installation(visae):
    code, said, _ = visae("doctor")
    assert code == 0
    assert "ok   libraries: torch" in said
