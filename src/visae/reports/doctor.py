"""Check what is on disk, or the installation, and say what to do: the verb ``doctor``.

A workspace is checked part by part; every finding is one line, good or bad.
"""

import dataclasses
import importlib.metadata
import importlib.util
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import visae
from visae.activations.store import ActivationStore
from visae.errors import StoreError, VisaeError
from visae.features.index import FeatureIndex
from visae.interventions.result import ExperimentResult
from visae.interventions.spec import read_spec
from visae.saes.checkpoint import load_sae, read_sae_record
from visae.storage.records import read_record

__all__ = ["Finding", "examine", "examine_installation"]

_EXTRAS = {
    "open_clip": "clip",
    "transformers": "transformers",
    "datasets": "datasets",
    "submitit": "slurm",
    "onnx": "demo",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was checked."""

    what: str
    """The thing."""
    is_fine: bool
    """Whether it is as it should be."""
    detail: str
    """What it is, or what is wrong and what to do."""


def examine(path: Path) -> list[Finding]:
    """Check a store, SAE, index or experiment, or every one of them below a folder.

    Raises:
        StoreError: when there is nothing of visae's at or below the path.
    """
    path = Path(path)
    checks = {
        "store.json": _check_store,
        "sae.json": _check_sae,
        "index.json": _check_index,
        "result.json": _check_experiment,
    }
    findings = []
    for name, check in checks.items():
        for found in sorted(path.rglob(name) if path.is_dir() else []):
            findings.append(_finding(found.parent, check))
    findings += [_unfinished(folder) for folder in _unfinished_runs(path)]
    if not findings:
        raise StoreError(
            "There is no store, SAE, index or experiment here",
            where=path,
            fix="Give a folder that record, train, index or intervene wrote, or one above it",
        )
    return findings


def examine_installation() -> list[Finding]:
    """Versions, devices, and which extras are installed."""
    import torch

    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("torch", "torchvision", "timm", "numpy", "safetensors")
    )
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    device = ", ".join(gpus) or f"no GPU; {torch.get_num_threads()} CPU threads"
    extras = [
        f"{extra} {'yes' if importlib.util.find_spec(module) else 'no'}"
        for module, extra in _EXTRAS.items()
    ]
    return [
        Finding(
            what="visae", is_fine=True, detail=f"{visae.__version__}, {platform.python_version()}"
        ),
        Finding(what="libraries", is_fine=True, detail=versions),
        Finding(what="device", is_fine=True, detail=device),
        Finding(what="extras", is_fine=True, detail=", ".join(extras)),
    ]


def _finding(folder: Path, check: Callable[[Path], str]) -> Finding:
    try:
        return Finding(what=str(folder), is_fine=True, detail=check(folder))
    except VisaeError as error:
        return Finding(what=str(folder), is_fine=False, detail=str(error))


def _check_store(folder: Path) -> str:
    store = ActivationStore(folder)
    store.verify()
    statistics = [
        f"{site} (‖x‖ median {store.statistics(site).norm_quantile(0.5):.3g}, "
        f"{len(store.statistics(site).outlier_dimensions)} outlier dimensions)"
        for site in store.sites
    ]
    return f"store of {store.n_images:,} images, every checksum right; {'; '.join(statistics)}"


def _check_sae(folder: Path) -> str:
    sae, record = load_sae(folder), read_sae_record(folder)
    return (
        f"SAE of {sae.n_features:,} features at {record.provenance.site} of "
        f"{record.provenance.model.title}; it reproduces its reference codes"
    )


def _check_index(folder: Path) -> str:
    index = FeatureIndex(folder)
    index.verify()
    return (
        f"index of {index.n_features:,} features on {index.n_images:,} images, every checksum right"
    )


def _check_experiment(folder: Path) -> str:
    result = read_record(ExperimentResult, folder / "result.json")
    read_spec(folder / "spec.toml")
    return f"experiment, {result.status}: {result.verdict.label}"


def _unfinished_runs(path: Path) -> Iterator[Path]:
    """Folders of trainings and experiments that have begun and not ended."""
    if path.is_dir():
        for resume in sorted(path.rglob("resume")):
            if resume.is_dir() and not (resume.parent / "sae.json").exists():
                yield resume.parent
        for registration in sorted(path.rglob("registration.json")):
            if not (registration.parent / "result.json").exists():
                yield registration.parent


def _unfinished(folder: Path) -> Finding:
    return Finding(
        what=str(folder),
        is_fine=False,
        detail="begun and not finished: run the same command again, it resumes",
    )
