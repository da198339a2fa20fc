"""Check what is on disk, or the installation, and say what to do: the verb ``doctor``.

A workspace is checked part by part; every finding is one line, good or bad.
"""

import importlib.metadata
import importlib.util
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import visae
from visae.errors import FeatureIndexError, StoreError, VisaeError
from visae.features.index import FeatureIndex
from visae.interventions.verification import verify_experiment
from visae.reports.finding import Finding
from visae.reports.store_check import check_store
from visae.saes.checkpoint import load_sae, read_sae_record
from visae.saes.hub import find_sae
from visae.storage.portable import resolve_portable

__all__ = ["examine", "examine_installation"]

_EXTRAS = {
    "open_clip": "clip",
    "transformers": "transformers",
    "datasets": "datasets",
    "submitit": "slurm",
    "onnx": "demo",
}


def examine(path: Path) -> list[Finding]:
    """Check a store, SAE, index or experiment, or every one of them below a folder.

    The path may be an SAE of the model hub.

    Raises:
        CheckpointError: when an SAE of the hub cannot be fetched.
        StoreError: when there is nothing of visae's at or below the path.
    """
    path = find_sae(path).folder
    checks = {
        "sae.json": _check_sae,
        "index.json": _check_index,
        "result.json": _check_experiment,
    }
    findings = []
    for found in sorted(path.rglob("store.json") if path.is_dir() else []):
        findings.append(check_store(found.parent))
    for name, check in checks.items():
        for found in sorted(path.rglob(name) if path.is_dir() else []):
            findings.append(_finding(found.parent, check))
    if path.is_dir():
        findings += [*_unfinished_trainings(path), *_unfinished_experiments(path)]
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


def _check_sae(folder: Path) -> str:
    sae, record = load_sae(folder), read_sae_record(folder)
    return (
        f"SAE of {sae.n_features:,} features at {record.provenance.site} of "
        f"{record.provenance.model.title}; it reproduces its reference codes"
    )


def _check_index(folder: Path) -> str:
    index = FeatureIndex(folder)
    index.verify()
    sae = resolve_portable(index.record.sae, folder)
    is_there = (sae / "sae.json").is_file()
    if is_there and read_sae_record(sae).weights.sha256 != index.record.sae_sha256:
        raise FeatureIndexError(
            f"This index was made from another SAE than the one that is now in {sae}",
            where=folder,
            fix="Delete the index and run visae index again",
        )
    return (
        f"index of {index.n_features:,} features on {index.n_images:,} images, every checksum right"
    )


def _check_experiment(folder: Path) -> str:
    result = verify_experiment(folder)
    return f"experiment, {result.status}: {result.verdict.label}; its files agree"


def _unfinished_trainings(path: Path) -> Iterator[Finding]:
    """Folders of trainings that have begun and not ended."""
    for metrics in sorted(path.rglob("metrics.jsonl")):
        if not (metrics.parent / "sae.json").exists():
            yield _unfinished(metrics.parent)


def _unfinished_experiments(path: Path) -> Iterator[Finding]:
    """Folders of experiments that are registered, or begun, and not ended."""
    for registration in sorted(path.rglob("registration.json")):
        folder = registration.parent
        if (folder / "result.json").exists():
            continue
        if (folder / "partial").exists():
            yield _unfinished(folder)
        else:
            what = "experiment, registered; its confirmation images have not been looked at"
            yield Finding(what=str(folder), is_fine=True, detail=what)


def _unfinished(folder: Path) -> Finding:
    return Finding(
        what=str(folder),
        is_fine=False,
        detail="begun and not finished: run the same command again, it resumes",
    )
