"""Whether the files of a finished experiment agree: what ``doctor`` asks.

The estimates are computed again from ``outcomes.parquet`` alone, so a result that was edited, or
that belongs to other outcomes, is found.
"""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float64

from visae.errors import ExperimentError
from visae.interventions.outcomes import read_outcomes
from visae.interventions.registry import check_registration, read_registration
from visae.interventions.result import ExperimentResult
from visae.interventions.spec import ExperimentSpec, read_spec, spec_hash
from visae.interventions.tasks import read_outcome
from visae.storage.records import read_record

__all__ = ["verify_experiment"]

_TOLERANCE = 1e-6
_FIX = "It was altered: restore the folder, or delete it and run the experiment again"


def verify_experiment(folder: Path) -> ExperimentResult:
    """The result of a finished experiment, after its files were compared with each other.

    Raises:
        ConfigError: when its spec cannot be read.
        ExperimentError: when a file is missing, damaged or does not agree with the others.
    """
    result = read_record(ExperimentResult, folder / "result.json", error=ExperimentError)
    registration = read_registration(folder)
    if result.status == "confirmatory":
        check_registration(registration, folder / "registration.json")
        _require(registration.spec_sha256 == result.spec_sha256, "registration", folder)
    spec = read_spec(folder / "spec.toml")
    _require(_hash(spec, result) == result.spec_sha256, "spec", folder)
    outcomes = read_outcomes(folder / "outcomes.parquet")
    class_name, measure = spec.outcome.class_name, spec.outcome.measure
    _require(class_name in outcomes.classes, "outcomes", folder)
    index = outcomes.classes.index(class_name)
    found = {
        name: read_outcome(torch.from_numpy(logits), index, measure).numpy()
        for name, logits in outcomes.logits("target").items()
    }
    _require(_agree(found, result), "outcomes", folder)
    return result


def _agree(found: dict[str, Float64[np.ndarray, " image"]], result: ExperimentResult) -> bool:
    """Whether the recorded mean effects are those of the outcomes."""
    recorded = {"edit": result.effect.value}
    for control in result.controls:
        marks = control.members or range(len(control.mean_effects))
        names = [f"{control.name}:{mark}" for mark in marks]
        recorded |= dict(zip(names, control.mean_effects, strict=True))
    same_images = all(len(values) == result.n_images for values in found.values())
    if not same_images or set(found) != {"baseline", *recorded}:
        return False
    return all(
        mean is not None and abs((found[name] - found["baseline"]).mean() - mean) <= _TOLERANCE
        for name, mean in recorded.items()
    )


def _hash(spec: ExperimentSpec, result: ExperimentResult) -> str:
    return spec_hash(spec, sae_sha256=result.sae_sha256, store_digest=result.store_digest)


def _require(agrees: bool, name: str, folder: Path) -> None:
    if not agrees:
        raise ExperimentError(f"The result does not agree with its {name}", where=folder, fix=_FIX)
