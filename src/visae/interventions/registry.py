"""Registration: what was fixed before the confirmation images were used, and what it is worth.

A registration is written once and never changed. A result counts as confirmatory only when its
spec and its feature are those registered, and its selection saw no confirmation image.
Source: RIGOR §5.
"""

import dataclasses
import datetime as dt
from collections.abc import Sequence
from pathlib import Path

import visae
from visae.errors import ExperimentError, VisaeError
from visae.interventions.discovery import Selection
from visae.interventions.result import Registration
from visae.storage.hashing import hash_json
from visae.storage.records import read_record, write_record

__all__ = ["Standing", "register"]


@dataclasses.dataclass(frozen=True)
class Standing:
    """A registration and what it says of a result."""

    registration: Registration
    """What this run would register: equal to the one on disk when all is well."""
    problems: tuple[str, ...]
    """Why the result is exploratory; empty when it is confirmatory."""
    warnings: tuple[str, ...]
    """What a reader should know besides."""


def register(
    out: Path,
    *,
    spec_sha256: str,
    selection: Selection,
    confirmation_ids: Sequence[str],
    exploratory: bool,
) -> Standing:
    """Register an experiment, or compare it with the registration that is there.

    Raises:
        ExperimentError: when the selection saw confirmation images and ``exploratory`` is false.
    """
    overlap = set(selection.image_ids) & set(confirmation_ids)
    if overlap and not exploratory:
        raise ExperimentError(
            f"{len(overlap)} of the confirmation images were seen when the feature was chosen",
            where="selection",
            fix="Choose it from an index built with --side discovery, or use best-for-class, or "
            "run with --exploratory to have the result labelled so",
        )
    ours = Registration(
        spec_sha256=spec_sha256,
        registered_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        visae_version=visae.__version__,
        feature=selection.feature,
        selection_rule=selection.rule,
        n_candidates=selection.n_candidates,
        discovery_digest=hash_json(sorted(selection.image_ids)),
        confirmation_digest=hash_json(sorted(confirmation_ids)),
    )
    problems = [selection.problem] if selection.problem else []
    if exploratory:
        problems.append("it was run with --exploratory")
    if overlap:
        problems.append(f"{len(overlap)} confirmation images were seen by the selection")
    path = out / "registration.json"
    if path.exists():
        found = read_record(Registration, path, error=ExperimentError)
        problems += _deviations(found, ours)
        ours = dataclasses.replace(ours, registered_at=found.registered_at)
    else:
        write_record(path, ours)
    return Standing(ours, tuple(problems), tuple(_earlier_looks(out, ours)))


def _deviations(found: Registration, ours: Registration) -> list[str]:
    """How this run departs from what was registered."""
    names = {
        "spec_sha256": "the spec was changed",
        "feature": f"the feature was {found.feature} and is now {ours.feature}",
        "discovery_digest": "the discovery images changed",
        "confirmation_digest": "the confirmation images changed",
    }
    return [
        f"{text} after the registration of {found.registered_at}"
        for field, text in names.items()
        if getattr(found, field) != getattr(ours, field)
    ]


def _earlier_looks(out: Path, ours: Registration) -> list[str]:
    """Other experiments beside this one that used the same confirmation images."""
    count = 0
    for path in sorted(out.resolve().parent.glob("*/registration.json")):
        if path.parent == out.resolve():
            continue
        try:
            other = read_record(Registration, path)
        except VisaeError:
            continue  # a damaged neighbour is not this experiment's problem
        same_images = other.confirmation_digest == ours.confirmation_digest
        count += same_images and other.registered_at <= ours.registered_at
    if not count:
        return []
    plural = "s" if count > 1 else ""
    warning = (
        f"The confirmation images were registered by {count} other experiment{plural} before this "
        "one; if they test one family of claims, give family_size"
    )
    return [warning]
