"""Save an SAE so that it loads anywhere and proves itself on every load.

``sae.json`` says everything about it; ``sae.safetensors`` holds the weights and a reference batch
of raw activations with its codes and reconstruction. Loading computes these again and refuses a
checkpoint that does not reproduce them.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

import visae
from visae.activations.store import ActivationStore
from visae.errors import CheckpointError, ConfigError
from visae.models.config import ModelIdentity
from visae.models.layout import Layout, TokenPolicy
from visae.models.preprocessing import Preprocessing
from visae.saes.codes import SparseCodes
from visae.saes.config import SAEConfig
from visae.saes.hub import find_sae
from visae.saes.learned import AnySparsity, Gated, JumpReLU, LearnedSparsity
from visae.saes.sae import SAE
from visae.saes.sparsity import BatchTopK, ReLU, TopK
from visae.storage.records import from_plain, read_record, to_plain, write_record
from visae.storage.tensors import FileRef, read_tensors, verify_file, write_tensors

__all__ = ["Provenance", "SAERecord", "load_sae", "read_sae_record", "save_sae"]

_BUILT_IN: tuple[type[Any], ...] = (ReLU, TopK, BatchTopK, JumpReLU, Gated)
_REFERENCE_TOKENS = 64
_TOLERANCE = 1e-3
_REFERENCE = ("activations", "offsets", "features", "values", "reconstruction")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where an SAE comes from."""

    model: ModelIdentity
    """The vision model whose activations it was made for."""
    site: str
    """The site."""
    target_site: str | None = None
    """The site whose activations it gives, for a transcoder."""
    layout: Layout
    """Token layout at the site."""
    preprocessing: Preprocessing | None
    """How images became the model's input; None where that is not known."""
    tokens: TokenPolicy
    """Which tokens it saw."""
    store_digest: str
    """Hash of the activations it was made from."""
    images: str | None = None
    """Location of the images it was made from without a store; None when there was a store."""
    n_tokens: int
    """Tokens it was trained on, repetitions counted; 0 for an untrained control."""
    seed: int
    """Seed of its initialisation."""
    control: str
    """``none``, or which kind of control it is."""
    engine: str = "reference"
    """What computed the last steps of its training; ``none`` for a control that never learned."""
    recipe: dict[str, Any]
    """Every setting of the training run."""

    @classmethod
    def of_store(
        cls,
        store: ActivationStore,
        site: str,
        *,
        tokens: TokenPolicy,
        n_tokens: int,
        seed: int,
        control: str,
        recipe: dict[str, Any],
    ) -> "Provenance":
        """The provenance of an SAE made from a store."""
        record = store.record
        return cls(
            model=record.identity,
            site=site,
            layout=store.site(site).layout,
            preprocessing=record.preprocessing,
            tokens=tokens,
            store_digest=store.digest,
            n_tokens=n_tokens,
            seed=seed,
            control=control,
            recipe=recipe,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SAERecord:
    """The file ``sae.json``."""

    kind: str = "sae"
    """Always ``sae``."""
    format: int = 2
    """Version of this format; version 1 had no transcoders."""
    visae_version: str
    """Version of visae that wrote it."""
    d_model: int
    """Width of the activations."""
    n_features: int
    """Number of features."""
    sparsity: dict[str, Any]
    """Kind of sparsity and its settings."""
    prefixes: tuple[int, ...]
    """Matryoshka prefixes, or none."""
    transcoder: bool = False
    """Whether it gives the activation at the provenance's target site."""
    provenance: Provenance
    """Model, site, data, seed and recipe."""
    metrics: dict[str, float]
    """Figures at the end of training."""
    weights: FileRef
    """The tensors, with what proves them whole."""

    @property
    def config(self) -> SAEConfig:
        """Shape and sparsity, for a built-in sparsity kind."""
        return _config(self, _BUILT_IN)


def save_sae(
    sae: SAE,
    folder: Path,
    *,
    provenance: Provenance,
    reference: Float[Tensor, "token d_model"],
    metrics: dict[str, float],
) -> SAERecord:
    """Write an SAE's checkpoint; ``sae.json`` is written last.

    ``reference`` is a batch of raw activations; its first 64 tokens are kept.
    """
    batch = reference[:_REFERENCE_TOKENS].float().cpu()
    on_cpu = SAE(sae.config)
    on_cpu.load_state_dict({k: v.detach().cpu() for k, v in sae.state_dict().items()})
    tensors = {f"sae.{name}": tensor for name, tensor in on_cpu.state_dict().items()}
    tensors |= _reference_tensors(on_cpu, batch)
    record = SAERecord(
        visae_version=visae.__version__,
        d_model=sae.d_model,
        n_features=sae.n_features,
        sparsity=to_plain(sae.config.sparsity),
        prefixes=sae.config.prefixes,
        transcoder=sae.config.transcoder,
        provenance=provenance,
        metrics=metrics,
        weights=write_tensors(Path(folder), "sae.safetensors", tensors),
    )
    write_record(Path(folder) / "sae.json", record)
    return record


def read_sae_record(folder: str | Path) -> SAERecord:
    """What ``sae.json`` says, without loading the weights; ``folder`` may be on the model hub.

    Raises:
        CheckpointError: when there is no SAE in the folder, or its record is damaged or newer.
    """
    folder = find_sae(folder).folder
    if not (folder / "sae.json").is_file():
        raise CheckpointError(
            "There is no SAE here",
            where=folder,
            fix="Give a folder with sae.json, or train one with: visae train --store DIR --out DIR",
        )
    return read_record(SAERecord, folder / "sae.json", error=CheckpointError)


def load_sae(
    folder: str | Path, *, device: str | torch.device = "cpu", kinds: Sequence[type[Any]] = ()
) -> SAE:
    """Load an SAE and check that it reproduces its reference codes and reconstruction.

    ``folder`` may be on the model hub: ``hf://owner/repository[/folder][@revision]``. ``kinds`` are
    your own sparsity kinds, besides the built-in ones.

    Raises:
        CheckpointError: when files are missing, altered or newer, when the sparsity kind is
            unknown, or when the codes differ from the recorded ones.
    """
    folder = find_sae(folder).folder
    record = read_sae_record(folder)
    verify_file(folder, record.weights, error=CheckpointError)
    tensors = read_tensors(folder / record.weights.name, error=CheckpointError)
    sae = SAE(_config(record, (*_BUILT_IN, *kinds)))
    state = {k.removeprefix("sae."): v for k, v in tensors.items() if k.startswith("sae.")}
    try:
        sae.load_state_dict(state, strict=True)
    except RuntimeError as failure:
        raise CheckpointError(
            f"The weights do not fit sae.json: {' '.join(str(failure).split())}",
            where=folder,
            fix="The files belong to different SAEs: restore them or train again",
        ) from failure
    _check_reference(sae, tensors, folder)
    return sae.requires_grad_(False).to(device).eval()


def _config(record: SAERecord, kinds: Sequence[type[Any]]) -> SAEConfig:
    known = {kind.kind: kind for kind in kinds}
    name = record.sparsity.get("kind")
    if name not in known:
        raise CheckpointError(
            f"Unknown sparsity kind {name}",
            where="sae.json",
            fix=f"Use one of {', '.join(sorted(known))}, or give your class in kinds=",
        )
    try:
        sparsity: AnySparsity = from_plain(known[name], record.sparsity, where="sae.json")
        return SAEConfig(
            d_model=record.d_model,
            n_features=record.n_features,
            sparsity=sparsity,
            prefixes=record.prefixes,
            transcoder=record.transcoder,
        )
    except ConfigError as failure:
        raise CheckpointError(
            f"This SAE cannot have this shape: {failure.what}",
            where=f"sae.json, {failure.where}",
            fix="It was altered: restore it or train again",
        ) from failure


def _reference_tensors(sae: SAE, batch: Float[Tensor, "token d_model"]) -> dict[str, Tensor]:
    codes = sae.encode_sparse(batch)
    return {
        "reference.activations": batch,
        "reference.offsets": codes.offsets,
        "reference.features": codes.features,
        "reference.values": codes.values,
        "reference.reconstruction": sae.decode_sparse(codes),
    }


def _check_reference(sae: SAE, tensors: dict[str, Tensor], folder: Path) -> None:
    """Compare codes and reconstruction with the recorded ones, to float32 rounding."""
    if missing := [name for name in _REFERENCE if f"reference.{name}" not in tensors]:
        raise CheckpointError(
            f"This checkpoint has no reference batch ({', '.join(missing)} missing)",
            where=folder,
            fix="Train or convert it again",
        )
    now = _reference_tensors(sae, tensors["reference.activations"])
    codes, expected = _dense(now, sae), _dense(tensors, sae)
    largest = float(expected.max()) if expected.numel() else 0.0
    tolerance = _TOLERANCE * largest
    near = _near_switch(sae, tensors["reference.activations"], tolerance)
    usual = ~_on_the_edge(codes, expected, near, tolerance)
    normal = [sae.normalise_target(x["reference.reconstruction"]) for x in (now, tensors)]
    checks = {
        "codes": (codes - expected, largest),
        "reconstruction": (normal[0] - normal[1], max(1.0, float(normal[1].abs().max()))),
    }
    for name, (difference, size) in checks.items():
        worst = float(difference[usual].abs().max()) if usual.any() else float("inf")
        if not worst <= _TOLERANCE * size:
            raise CheckpointError(
                f"This SAE does not reproduce its own {name}: they differ by up to {worst:.3g} "
                "(in normalised units)",
                where=folder,
                fix="It was altered, or written by an incompatible visae: restore or train again",
            )


def _on_the_edge(
    codes: Float[Tensor, "token feature"],
    expected: Float[Tensor, "token feature"],
    near: Bool[Tensor, "token feature"],
    tolerance: float,
) -> Bool[Tensor, " token"]:
    """Tokens where only features at the very edge of the selection differ, by rounding.

    That is the token's smallest activation, or where the sparsity kind has an edge of its own.
    """
    flipped = (codes > 0) != (expected > 0)
    both = torch.maximum(codes, expected)
    floor = torch.where(both > 0, both, torch.inf).min(dim=1, keepdim=True).values
    edge = flipped & ((both <= floor + tolerance) | near)
    return flipped.any(dim=1) & (edge == flipped).all(dim=1)


def _near_switch(
    sae: SAE, x: Float[Tensor, "token d_model"], tolerance: float
) -> Bool[Tensor, "token feature"]:
    """Where a learned sparsity kind is about to switch a feature on or off."""
    pre = sae.pre_activations(sae.normalise(x))
    if not isinstance(sae.config.sparsity, LearnedSparsity):
        return torch.zeros_like(pre, dtype=torch.bool)
    return sae.config.sparsity.margin(pre, sae.vectors).abs() <= tolerance


def _dense(tensors: dict[str, Tensor], sae: SAE) -> Float[Tensor, "token feature"]:
    return SparseCodes(
        tensors["reference.offsets"],
        tensors["reference.features"],
        tensors["reference.values"],
        sae.n_features,
    ).dense()
