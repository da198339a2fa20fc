"""Publish an SAE on the model hub, with a page made from what its files say.

Files are checked and cleaned of what tells of this machine first, then sent in one commit.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from visae.errors import CheckpointError
from visae.evaluation.card import ReportCard
from visae.reports.model_card import CardFacts, collection_card, model_card
from visae.saes.checkpoint import SAERecord, load_sae
from visae.saes.hub import CHECKPOINT_FILES, COMPANION_FILES, find_sae
from visae.storage.hub_path import HubPath
from visae.storage.hub_transfer import CommitPlan, commit_files
from visae.storage.records import from_plain, read_record, to_plain
from visae.storage.redaction import redact

__all__ = ["PushConfig", "Pushed", "push_sae"]

_RECORD, _WEIGHTS = CHECKPOINT_FILES
_REPORT, _PAGE = COMPANION_FILES
_LOG = "metrics.jsonl"

R = TypeVar("R")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PushConfig:
    """How to publish an SAE."""

    private: bool = False
    """Only those whom you let in may read the repository."""
    license: str | None = None
    """Licence as the hub writes it, such as ``apache-2.0``; unset: not stated."""
    datasets: tuple[str, ...] = ()
    """The hub's datasets that it learned from, ``owner/name``, besides one that it names itself."""
    metrics_log: bool = False
    """Publish the figures of every step of the training, too."""
    keep_page: bool = False
    """Leave a README.md that is there as it is."""


class Pushed(NamedTuple):
    """A published SAE."""

    place: HubPath
    """Where it is, at its commit."""
    url: str
    """The commit's page."""
    files: tuple[str, ...]
    """Paths that the commit may have changed."""
    redacted: tuple[str, ...]
    """What was changed because it told of this machine: file and key."""


def push_sae(
    sae: str | Path, to: str, *, config: PushConfig | None = None, kinds: Sequence[type[Any]] = ()
) -> Pushed:
    """Publish an SAE, its report card if it has one, and its page in one commit.

    Absolute paths and the name of this machine are left out; ``resume/`` never goes along.

    Args:
        sae: Folder of the SAE; it must reproduce its reference codes.
        to: ``hf://owner/repository[/folder]``; the repository is made if there is none.
        config: How to publish it.
        kinds: Sparsity kinds of your own, besides the built-in ones.

    Raises:
        CheckpointError: when ``to`` is no place on the hub, the SAE cannot be loaded, its report
            card is of another SAE, nobody is logged in, or the hub refuses or cannot be reached.
            Nothing is published then.
    """
    settings = config or PushConfig()
    place = HubPath.parse(to, error=CheckpointError)
    if place.revision is not None:
        what, fix = "What is published becomes the newest state", f"Leave @{place.revision} out"
        raise CheckpointError(what, where=to, fix=fix)
    folder = find_sae(sae).folder
    load_sae(folder, kinds=kinds)
    clean = _clean(folder, settings)
    files = {place.file(name): content for name, content in clean.files.items()}
    page = {place.file(_PAGE): _page(place, clean, settings, kinds)}
    front = {_PAGE: collection_card(place).encode()} if place.folder else {}
    made = commit_files(
        CommitPlan(
            place=place,
            files=files if settings.keep_page else files | page,
            unless_there=front | page if settings.keep_page else front,
            stale=(place.file(_REPORT), place.file(_LOG)),
            private=settings.private,
            message=f"Publish SAE {place.name}",
        ),
        error=CheckpointError,
    )
    return Pushed(made.place, made.url, (*files, *page), clean.redacted)


class _Clean(NamedTuple):
    """What is published of an SAE besides its page."""

    record: SAERecord
    report: ReportCard | None
    files: dict[str, bytes | Path]
    redacted: tuple[str, ...]


def _clean(folder: Path, config: PushConfig) -> _Clean:
    """The files as they are published, which tell nothing of this machine."""
    record, changed = _redacted(folder, _RECORD, SAERecord)
    report = None
    files: dict[str, bytes | Path] = {_RECORD: _json(record), _WEIGHTS: folder / _WEIGHTS}
    if record.weights.name != _WEIGHTS:
        what, fix = "This SAE keeps its weights in another file", "Train or convert it again"
        raise CheckpointError(what, where=folder, fix=fix)
    if (folder / _REPORT).is_file():
        report, more = _redacted(folder, _REPORT, ReportCard)
        changed += more
        files[_REPORT] = _json(report)
        _require_own(report, record, folder)
    if config.metrics_log and (folder / _LOG).is_file():
        lines = redact((folder / _LOG).read_text(encoding="utf-8").splitlines())
        changed += [f"{_LOG} {key}" for key in lines.changed]
        files[_LOG] = "".join(f"{line}\n" for line in lines.data).encode()
    return _Clean(record, report, files, tuple(changed))


def _redacted(folder: Path, name: str, record_type: type[R]) -> tuple[R, list[str]]:
    """A record without what tells of this machine, and the keys that were changed."""
    record = read_record(record_type, folder / name, error=CheckpointError)
    clean = redact(to_plain(record))
    changed = [f"{name} {key}" for key in clean.changed]
    return from_plain(record_type, clean.data, where=folder / name, error=CheckpointError), changed


def _json(record: Any) -> bytes:
    return f"{json.dumps(to_plain(record), indent=1, ensure_ascii=False)}\n".encode()


def _require_own(report: ReportCard, record: SAERecord, folder: Path) -> None:
    if report.sae_sha256 != record.weights.sha256:
        raise CheckpointError(
            "The report card here is of another SAE",
            where=folder / _REPORT,
            fix="Run visae evaluate again, or remove it",
        )


def _page(place: HubPath, clean: _Clean, config: PushConfig, kinds: Sequence[type[Any]]) -> bytes:
    images = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(:.*)?", clean.record.provenance.images or "")
    facts = CardFacts(
        place=place,
        record=clean.record,
        report=clean.report,
        license=config.license,
        datasets=(*config.datasets, *([images[1]] if images else [])),
        needs_kind=any(kind.kind == clean.record.sparsity["kind"] for kind in kinds),
    )
    return model_card(facts).encode()
