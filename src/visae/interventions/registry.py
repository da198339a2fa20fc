"""Registration: what was fixed before the confirmation images were used, and what it is worth.

A registration is written once and never changed. A result counts as confirmatory only when its
spec, feature, images and labels are those registered, and its selection saw no confirmation image.
Source: RIGOR §5.
"""

import dataclasses
import datetime as dt
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import visae
from visae.errors import ExperimentError, VisaeError
from visae.images.catalog import ImageTable
from visae.interventions.discovery import Selection
from visae.interventions.result import Registration
from visae.storage.hashing import hash_json
from visae.storage.records import read_record, write_record

__all__ = ["Standing", "check_registration", "labels_digest", "read_registration", "register"]


@dataclasses.dataclass(frozen=True)
class Standing:
    """A registration and what it says of a result."""

    registration: Registration
    """What this run would register: equal to the one on disk when all is well."""
    problems: tuple[str, ...]
    """Why the result is exploratory; empty when it is confirmatory."""
    warnings: tuple[str, ...]
    """What a reader should know besides."""
    forced: bool
    """Whether it was asked for as exploratory."""


def register(
    out: Path,
    *,
    settings: dict[str, Any],
    selection: Selection,
    images: ImageTable,
    confirmation: Sequence[int],
    exploratory: bool,
) -> Standing:
    """Register an experiment, or compare it with the registration that is there.

    Args:
        out: Folder of the experiment.
        settings: The spec's canonical form.
        selection: The feature, and the images that chose it.
        images: All images with their labels.
        confirmation: Rows of the confirmation images.
        exploratory: Whether the experiment may run although it cannot confirm.

    Raises:
        ExperimentError: when the selection saw confirmation images and ``exploratory`` is false.
    """
    confirmation_ids = [images.content_ids[row] for row in confirmation]
    overlap = set(selection.image_ids) & set(confirmation_ids)
    if overlap and not exploratory:
        raise ExperimentError(
            f"{len(overlap)} of the confirmation images were seen when the feature was chosen",
            where="selection",
            fix="Choose it from an index built with --side discovery, or use best-for-class, or "
            "run with --exploratory to have the result labelled so",
        )
    ours = Registration(
        spec=settings,
        spec_sha256=hash_json(settings),
        registered_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        visae_version=visae.__version__,
        feature=selection.feature,
        selection_rule=selection.rule,
        n_candidates=selection.n_candidates,
        discovery_digest=hash_json(sorted(selection.image_ids)),
        confirmation_digest=hash_json(sorted(confirmation_ids)),
        labels_digest=labels_digest(images),
    )
    problems = [selection.problem] if selection.problem else []
    if exploratory:
        problems.append("it was run with --exploratory")
    if overlap:
        problems.append(f"{len(overlap)} confirmation images were seen by the selection")
    if (out / "registration.json").exists():
        found = read_registration(out)
        problems += _deviations(found, ours)
        ours = dataclasses.replace(ours, registered_at=found.registered_at)
    else:
        write_record(out / "registration.json", ours)
    return Standing(ours, tuple(problems), tuple(_earlier_looks(out, ours)), exploratory)


def read_registration(out: Path) -> Registration:
    """The registration of an experiment.

    Raises:
        ExperimentError: when it is missing or damaged.
    """
    return read_record(Registration, out / "registration.json", error=ExperimentError)


def check_registration(registration: Registration, where: Path) -> None:
    """Raise ``ExperimentError`` unless a registration's spec has the hash that it gives."""
    if hash_json(registration.spec) != registration.spec_sha256:
        raise ExperimentError(
            "The registration was altered: its spec has another hash",
            where=where,
            fix="Restore it; an experiment without its registration is exploratory",
        )


def labels_digest(images: ImageTable) -> str:
    """Hash of every image with its label and group, in any order."""
    rows = zip(images.content_ids, images.labels, images.groups, strict=True)
    return hash_json(sorted([image, label or "", group or ""] for image, label, group in rows))


def _deviations(found: Registration, ours: Registration) -> list[str]:
    """How this run departs from what was registered."""
    texts = []
    if found.spec_sha256 != ours.spec_sha256:
        changed = ", ".join(_changed(found.spec, ours.spec)) or "its hash"
        texts.append(f"the spec was changed ({changed})")
    elif hash_json(found.spec) != found.spec_sha256:
        texts.append("the registered spec was altered")
    if found.feature != ours.feature:
        texts.append(f"the feature was {found.feature} and is now {ours.feature}")
    for part in ("discovery", "confirmation"):
        name = f"{part}_digest"
        if getattr(found, name) != getattr(ours, name):
            texts.append(f"the {part} images changed")
    if found.labels_digest != ours.labels_digest:
        texts.append("the labels or groups of the images changed")
    return [f"{text} after the registration of {found.registered_at}" for text in texts]


def _changed(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """The keys at which two plain values differ, as ``edit.value``."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            yield from _changed(old.get(key), new.get(key), f"{path}.{key}".removeprefix("."))
    elif old != new:
        yield path


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
