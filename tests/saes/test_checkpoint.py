import dataclasses
import json
from typing import Literal

import pytest
import torch

from visae.errors import CheckpointError
from visae.models.config import ModelIdentity
from visae.models.layout import Layout
from visae.models.preprocessing import Preprocessing
from visae.saes.checkpoint import Provenance, load_sae, read_sae_record, save_sae
from visae.saes.codes import SparseCodes
from visae.saes.config import SAEConfig
from visae.saes.learned import Gated, JumpReLU
from visae.saes.sae import SAE
from visae.saes.sparsity import BatchTopK, ReLU, TopK
from visae.storage.tensors import read_tensors, write_tensors

D_MODEL, N_FEATURES = 6, 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class AtLeast:
    """A user's own kind: keeps what reaches a floor."""

    kind: Literal["at-least"] = "at-least"
    floor: float = 0.5
    uses_threshold = False
    compares_features = False

    def select(self, pre):
        return SparseCodes.from_dense(torch.where(pre >= self.floor, pre, 0))

    def penalty(self, values, norms, n_tokens):
        return values.new_zeros(())


KINDS = [
    ReLU(l1=0.05),
    TopK(k=3),
    BatchTopK(k=3),
    JumpReLU(target_l0=3, bandwidth=0.5),
    Gated(l1=0.05),
]

PROVENANCE = Provenance(
    model=ModelIdentity(name="timm/tiny", title="Tiny", weights_sha256="0" * 64),
    site="residual@1",
    layout=Layout(special=("cls",), grid=(2, 3)),
    preprocessing=Preprocessing(size=(8, 12), crop_share=0.9),
    tokens="patches",
    store_digest="1" * 64,
    n_tokens=1000,
    seed=3,
    control="none",
    recipe={"loop": {"batch_size": 64}, "site": "residual@1"},
)


def make_sae(sparsity, *, size=1.0, seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    sae = SAE(SAEConfig(d_model=D_MODEL, n_features=N_FEATURES, sparsity=sparsity, **changes))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        sae.mean.copy_(torch.randn(D_MODEL, generator=generator) * size)
        sae.scale.fill_(2.5 * size)
        sae.threshold.fill_(0.4)
        if sae.config.transcoder:
            sae.target_mean.copy_(torch.randn(D_MODEL, generator=generator) * 3 * size)
            sae.target_scale.fill_(0.6 * size)
    return sae


def reference(n_tokens=100, size=1.0):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(n_tokens, D_MODEL, generator=generator) * 3 * size


def save(sae, folder, **changes):
    options = {"provenance": PROVENANCE, "reference": reference(), "metrics": {"nmse": 0.25}}
    return save_sae(sae, folder, **options | changes)


@pytest.fixture
def folder(tmp_path):
    """A saved BatchTopK SAE, to be damaged."""
    save(make_sae(BatchTopK(k=3)), tmp_path / "sae")
    return tmp_path / "sae"


def edit(folder, **changes):
    path = folder / "sae.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder, change):
    """Alter the tensors and make the recorded checksum fit again."""
    tensors = read_tensors(folder / "sae.safetensors")
    change(tensors)
    ref = write_tensors(folder, "sae.safetensors", tensors)
    edit(folder, weights=dataclasses.asdict(ref))


# Round trips


@pytest.mark.parametrize("sparsity", KINDS, ids=lambda kind: kind.kind)
@pytest.mark.parametrize("prefixes", [(), (2, 6, 14, 32)], ids=str)
@pytest.mark.parametrize("transcoder", [False, True], ids=["sae", "transcoder"])
def test_a_loaded_sae_is_bit_equal(tmp_path, sparsity, prefixes, transcoder):
    sae = make_sae(sparsity, prefixes=prefixes, transcoder=transcoder)
    save(sae, tmp_path / "sae")
    loaded = load_sae(tmp_path / "sae")
    assert loaded.config == sae.config
    for name, tensor in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
        assert loaded.state_dict()[name].dtype == torch.float32
    x = reference(500)
    assert torch.equal(loaded.encode(x), sae.encode(x))
    assert torch.equal(loaded(x), sae(x))


def test_a_loaded_sae_is_frozen_and_shares_no_memory(folder):
    sae = load_sae(folder)
    tensors = [*sae.parameters(), *sae.buffers()]
    assert not any(t.requires_grad for t in tensors)
    assert not sae.training
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)


def test_weights_that_shared_memory_are_saved_apart(tmp_path):
    """saev once made W_enc a view of W_dec: loading overwrote one with the other."""
    sae = make_sae(TopK(k=3))
    sae.W_enc.data = sae.W_dec.data
    save(sae, tmp_path / "sae")
    loaded = load_sae(tmp_path / "sae")
    assert torch.equal(loaded.W_enc, loaded.W_dec)
    with torch.no_grad():
        loaded.W_enc += 1
    assert torch.equal(loaded.W_dec, sae.W_dec)


def test_the_threshold_is_saved(folder):
    """overcomplete lost it: another L0 after loading."""
    assert float(load_sae(folder).threshold) == pytest.approx(0.4)


def test_a_users_own_kind_is_loaded_with_its_class(tmp_path):
    sae = make_sae(AtLeast(floor=0.75))
    save(sae, tmp_path / "sae")
    loaded = load_sae(tmp_path / "sae", kinds=[AtLeast])
    assert loaded.config.sparsity == AtLeast(floor=0.75)
    assert torch.equal(loaded.encode(reference()), sae.encode(reference()))
    with pytest.raises(CheckpointError, match=r"Unknown sparsity kind at-least.*kinds="):
        load_sae(tmp_path / "sae")


def test_the_record_says_where_the_sae_comes_from(folder):
    record = read_sae_record(folder)
    assert record.provenance == PROVENANCE
    assert record.metrics == {"nmse": 0.25}
    assert record.config == SAEConfig(
        d_model=D_MODEL, n_features=N_FEATURES, sparsity=BatchTopK(k=3)
    )


def test_metrics_that_are_no_numbers_are_kept(tmp_path):
    save(make_sae(ReLU()), tmp_path / "sae", metrics={"nmse": float("nan")})
    assert read_sae_record(tmp_path / "sae").metrics["nmse"] != 0.0
    load_sae(tmp_path / "sae")


def test_saving_does_not_change_the_sae(tmp_path):
    sae = make_sae(BatchTopK(k=3))
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    save(sae, tmp_path / "sae")
    assert all(torch.equal(before[name], t) for name, t in sae.state_dict().items())
    assert all(parameter.requires_grad for parameter in sae.parameters())


def test_an_sae_that_is_never_active_is_loaded(tmp_path):
    sae = make_sae(BatchTopK(k=3))
    sae.threshold.fill_(1e9)
    save(sae, tmp_path / "sae")
    load_sae(tmp_path / "sae")


def test_the_record_of_a_transcoder_names_both_sites(tmp_path):
    provenance = dataclasses.replace(PROVENANCE, target_site="mlp@1")
    save(make_sae(TopK(k=3), transcoder=True), tmp_path / "sae", provenance=provenance)
    record = read_sae_record(tmp_path / "sae")
    assert (record.provenance.site, record.provenance.target_site) == ("residual@1", "mlp@1")
    assert record.config.transcoder


def test_the_first_format_is_still_read(tmp_path):
    sae = make_sae(BatchTopK(k=3))
    save(sae, tmp_path / "sae")
    path = tmp_path / "sae" / "sae.json"
    data = json.loads(path.read_text()) | {"format": 1}
    del data["transcoder"], data["provenance"]["target_site"], data["provenance"]["images"]
    path.write_text(json.dumps(data))
    assert torch.equal(load_sae(tmp_path / "sae").encode(reference()), sae.encode(reference()))


def test_weights_of_lower_precision_are_saved_in_single(tmp_path):
    """A threshold in bfloat16 would stop learning."""
    sae = make_sae(JumpReLU(target_l0=3)).bfloat16()
    save(sae, tmp_path / "sae")
    assert load_sae(tmp_path / "sae").learned["threshold"].dtype == torch.float32


# Damage


def test_a_folder_without_an_sae_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no SAE here.*visae train"):
        load_sae(tmp_path)


@pytest.mark.parametrize("place", [0, 100, -1])
def test_altered_weights_are_refused(folder, place):
    data = bytearray((folder / "sae.safetensors").read_bytes())
    data[place] ^= 16
    (folder / "sae.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum differs"):
        load_sae(folder)


def test_truncated_weights_are_refused(folder):
    data = (folder / "sae.safetensors").read_bytes()
    (folder / "sae.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="bytes instead of"):
        load_sae(folder)


def test_missing_weights_are_refused(folder):
    (folder / "sae.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        load_sae(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": 3}, r"Format 3 is newer.*Upgrade visae"),
        ({"kind": "activation store"}, "This is activation store, not sae"),
        (
            {"sparsity": {"kind": "jump-relu"}},
            r"Unknown sparsity kind jump-relu.*batch-topk, gated, jumprelu",
        ),
        ({"sparsity": {"kind": "topk", "q": 3}}, "unknown key q"),
        ({"sparsity": {"kind": "topk", "k": 0}}, "k is 0"),
        ({"sparsity": {"kind": "topk", "k": "3"}}, "not a whole number"),
        ({"sparsity": {}}, "Unknown sparsity kind None"),
        ({"prefixes": [4, 8]}, r"cannot have this shape: The prefixes must ascend.*sae\.json"),
        ({"d_model": 7}, r"weights do not fit sae\.json"),
        ({"n_features": 64}, r"weights do not fit sae\.json"),
        ({"d_model": -1}, "cannot have this shape"),
        ({"unheard_of": 1}, "unknown key unheard_of"),
        ({"provenance": {}}, "missing"),
    ],
)
def test_an_altered_json_is_refused(folder, changes, said):
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=said):
        load_sae(folder)


def test_a_truncated_json_is_refused(folder):
    text = (folder / "sae.json").read_text()
    (folder / "sae.json").write_text(text[: len(text) // 2])
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_sae(folder)


@pytest.mark.parametrize("name", ["activations", "offsets", "features", "values", "reconstruction"])
def test_a_missing_reference_is_refused(folder, name):
    rewrite(folder, lambda tensors: tensors.pop(f"reference.{name}"))
    with pytest.raises(CheckpointError, match=rf"no reference batch \({name} missing\)"):
        load_sae(folder)


def test_a_missing_weight_is_refused(folder):
    rewrite(folder, lambda tensors: tensors.pop("sae.b_dec"))
    with pytest.raises(CheckpointError, match=r"do not fit sae\.json.*b_dec"):
        load_sae(folder)


# The reference: whatever was altered, an SAE that does not reproduce itself is refused


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("W_enc", "codes"),
        ("b_enc", "codes"),
        ("W_dec", "reconstruction"),
        ("b_dec", "codes"),
        ("mean", "codes"),
        ("scale", "codes"),
        ("threshold", "codes"),
    ],
)
def test_one_changed_number_is_refused_whatever_the_checksum(tmp_path, name, said, size):
    folder = tmp_path / "sae"
    sae = make_sae(BatchTopK(k=3), size=size)
    save(sae, folder, reference=reference(size=size))
    active = int(sae.encode(reference(size=size)).sum(0).argmax())

    def change(tensors):
        tensor = tensors[f"sae.{name}"]
        place = (
            tensor if tensor.ndim == 0 else tensor[active if tensor.shape[0] == N_FEATURES else 0]
        )
        place += 0.1 * (place.abs() + (size if name == "mean" else 0.1))

    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=f"does not reproduce its own {said}"):
        load_sae(folder)


@pytest.mark.parametrize("sparsity", KINDS, ids=lambda kind: kind.kind)
def test_another_rule_than_the_saved_one_is_refused(tmp_path, sparsity):
    """An importer that picks the wrong formula changes the codes, and is caught."""
    save(make_sae(sparsity), tmp_path / "sae")
    others = [kind for kind in KINDS if kind.kind != sparsity.kind]
    for other in others:
        edit(tmp_path / "sae", sparsity=dataclasses.asdict(other))
        with pytest.raises(CheckpointError, match=r"its own codes|weights do not fit"):
            load_sae(tmp_path / "sae")


@pytest.mark.parametrize("sparsity", KINDS, ids=lambda kind: kind.kind)
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_rounding_of_another_machine_is_no_alteration(tmp_path, sparsity, size):
    folder = tmp_path / "sae"
    save(make_sae(sparsity, size=size), folder, reference=reference(size=size))
    generator = torch.Generator().manual_seed(0)

    def change(tensors):
        for name in ("values", "reconstruction"):
            tensor = tensors[f"reference.{name}"]
            tensor *= 1 + 1e-5 * torch.randn(tensor.shape, generator=generator)

    rewrite(folder, change)
    load_sae(folder)


def test_a_feature_at_the_edge_of_the_selection_may_flip(tmp_path):
    """Two pre-activations a rounding apart at the k-th place: either may be kept."""
    sae = make_sae(TopK(k=3))
    with torch.no_grad():
        sae.W_enc[1] = sae.W_enc[0]
        sae.b_enc[1] = sae.b_enc[0]
    save(sae, tmp_path / "sae")
    with torch.no_grad():
        sae.b_enc[0] += 2e-7
        sae.b_enc[1] -= 2e-7

    def change(tensors):
        tensors["sae.b_enc"] = sae.b_enc.detach()

    rewrite(tmp_path / "sae", change)
    load_sae(tmp_path / "sae")


@pytest.mark.parametrize("sparsity", KINDS[3:], ids=lambda kind: kind.kind)
def test_a_feature_at_its_own_edge_may_flip(tmp_path, sparsity):
    """Rounding may open a gate at zero, or pass a feature's own threshold, with a large value."""
    sae = make_sae(sparsity)
    x = reference()
    with torch.no_grad():
        pre = sae.pre_activations(sae.normalise(x))
        if sparsity.kind == "gated":
            sae.learned["magnitude_bias"] += 3.0
            sae.b_enc[4] -= pre[7, 4] - 1e-5
        else:
            sae.learned["threshold"][4] = pre[:64, 4].max() - 1e-5
    save(sae, tmp_path / "sae")
    with torch.no_grad():
        sae.b_enc[4] -= 3e-5

    def change(tensors):
        tensors["sae.b_enc"] = sae.b_enc.detach()

    before = load_sae(tmp_path / "sae").encode(x[:64]) > 0
    rewrite(tmp_path / "sae", change)
    after = load_sae(tmp_path / "sae").encode(x[:64]) > 0
    assert int((before != after).sum()) == 1


def test_only_the_first_tokens_are_kept_as_reference(folder):
    tensors = read_tensors(folder / "sae.safetensors")
    assert torch.equal(tensors["reference.activations"], reference()[:64])
