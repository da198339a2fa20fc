"""The page of a published SAE on the model hub: its README, made from what its files say.

Nothing is claimed that is not in ``sae.json`` or in the report card; every metric stands beside
its nulls, and an SAE that was never evaluated is said to be that.
"""

import dataclasses
import json
from collections.abc import Iterable, Sequence

from visae.evaluation.card import ReportCard
from visae.evaluation.rows import MetricRow
from visae.reports.wording import count, estimated, number, plural
from visae.saes.checkpoint import SAERecord
from visae.storage.hub_path import HubPath

__all__ = ["CardFacts", "collection_card", "model_card"]

_TAGS = ["visae", "sparse-autoencoder", "interpretability", "vision"]
_ARROWS = {"higher": " ↑", "lower": " ↓", "neither": ""}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What an SAE's page is made from."""

    place: HubPath
    """Where it is published."""
    record: SAERecord
    """What ``sae.json`` says."""
    report: ReportCard | None = None
    """Its report card, if it has one."""
    license: str | None = None
    """The licence, as the hub writes it (``apache-2.0``); None: not stated."""
    datasets: tuple[str, ...] = ()
    """The hub's datasets that it learned from."""
    needs_kind: bool = False
    """Whether loading needs a class that does not come with visae."""


def model_card(facts: CardFacts) -> str:
    """The page as Markdown, with the header that the hub reads."""
    sections = (
        _header(facts.license, facts.datasets) + f"\n\n# {facts.place.name}",
        _summary(facts.record),
        _loading(facts),
        _inputs(facts.record),
        _recipe(facts.record),
        _metrics(facts.report),
        _limits(facts),
    )
    return "\n\n".join(sections) + "\n"


def collection_card(place: HubPath) -> str:
    """The page of a repository whose folders hold one SAE each."""
    owner_and_name = HubPath(repository=place.repository)
    return "\n".join(
        (
            _header(None, ()),
            "",
            f"# {owner_and_name.name}",
            "",
            "Sparse autoencoders of vision models, one in each folder, which has its own page.",
            "",
            _python(f'sae = load_sae("{owner_and_name}/FOLDER")'),
            "",
        )
    )


def _header(license_name: str | None, datasets: Sequence[str]) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        library_name="visae",
        license=license_name,
        tags=_TAGS,
        datasets=sorted(set(datasets)) or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _summary(record: SAERecord) -> str:
    made = record.provenance
    what = "transcoder" if record.transcoder else "sparse autoencoder"
    text = (
        f"A {what} with {count(record.n_features)} features, made with visae for the activations "
        f"of **{_line(made.model.title)}** at `{_line(made.site)}`"
    )
    text += (
        f", which gives those at `{_line(str(made.target_site))}`." if record.transcoder else "."
    )
    if made.control != "none":
        text += (
            f"\n\n**This is a control** (`{_line(made.control)}`): it is there for comparison, and "
            "its features are not meant to mean anything."
        )
    return text


def _loading(facts: CardFacts) -> str:
    record = facts.record
    kinds = ", kinds=[TheKind]" if facts.needs_kind else ""
    own = (
        f"\n\nIts sparsity kind, `{record.sparsity.get('kind')}`, does not come with visae: "
        "give its class as `TheKind`."
    )
    code = _python(
        f'sae = load_sae("{facts.place}"{kinds})',
        f"codes = sae.encode(activations)  # (token, {record.d_model}) to "
        f"(token, {record.n_features})",
        "reconstruction = sae.decode(codes)",
    )
    return (
        f"## Load\n\n{code}\n\n"
        f"`activations` are raw, as the model gives them at `{_line(record.provenance.site)}`: the "
        "SAE normalises them itself. The file holds a reference batch with its codes and "
        "reconstruction; loading computes them again and refuses the SAE if they differ."
        f"{own if facts.needs_kind else ''}"
    )


def _inputs(record: SAERecord) -> str:
    made = record.provenance
    rows, columns = made.layout.grid
    revision = f", revision `{_line(made.model.revision)}`" if made.model.revision else ""
    lines = [
        ("Model", f"`{_line(made.model.name)}`{revision}"),
        ("Model weights", f"`{made.model.weights_sha256 or 'unknown'}` (visae's hash)"),
        ("Site", f"`{_line(made.site)}`, width {record.d_model}"),
        ("Tokens", f"{made.tokens}; patch grid of {rows} × {columns}"),
        ("Special tokens", _line(", ".join(made.layout.special)) or "none"),
    ]
    if made.preprocessing is not None:
        height, width = made.preprocessing.size
        how = f"{height} × {width} pixels, crop share {made.preprocessing.crop_share:g}"
        lines.append(("Images", f"{how}, {made.preprocessing.interpolation}"))
    return "## What it reads\n\n" + _table(("", ""), lines)


def _recipe(record: SAERecord) -> str:
    made = record.provenance
    settings = {name: value for name, value in record.sparsity.items() if name != "kind"}
    kind = f"{record.sparsity.get('kind')} {json.dumps(settings)}"
    images = [("Images", f"`{_line(made.images)}`")] if made.images else []
    figures = ", ".join(f"{name} {number(value)}" for name, value in record.metrics.items())
    lines = [
        ("Sparsity", f"`{_line(kind)}`"),
        ("Nested prefixes", ", ".join(map(str, record.prefixes)) or "none"),
        *images,
        ("Activations", f"`{made.store_digest}` (visae's hash)"),
        ("Tokens seen", count(made.n_tokens)),
        ("Seed", str(made.seed)),
        ("At the end of training", _line(figures) or "not recorded"),
        ("visae", _line(record.visae_version)),
    ]
    recipe = json.dumps(made.recipe, indent=1, ensure_ascii=False).replace("```", "'''")
    return (
        "## How it was made\n\n"
        + _table(("", ""), lines)
        + f"\n\n<details><summary>Every setting</summary>\n\n```json\n{recipe}\n```\n\n</details>"
    )


def _metrics(report: ReportCard | None) -> str:
    if report is None:
        return (
            "## Metrics\n\nIt was published without a report card. Make one with: "
            "`visae evaluate --sae SAE --store STORE`."
        )
    head = ("metric", "value", "strongest null", "value less that null")
    lines = [_metric(row) for row in report.rows if row.value.value is not None]
    missing = [row for row in report.rows if row.value.value is None]
    text = (
        f"## Metrics\n\nOn {plural(report.n_images, 'image')} ({count(report.n_tokens)} tokens) of "
        f"the activations `{report.store_digest[:12]}`. A null is a dictionary of the same size "
        "and L0 that has learned nothing, or chance; in brackets are intervals of "
        f"{100 * report.config.level:g} %; arrows say which way is better.\n\n"
        + _table(head, lines)
    )
    if missing:
        reasons = (f"{_line(row.title)} ({_line(row.value.note)})" for row in missing)
        text += "\n\nNot measured: " + "; ".join(reasons) + "."
    return text


def _metric(row: MetricRow) -> tuple[str, str, str, str]:
    null, less = "", ""
    if row.difference is not None:
        null = f"{row.difference.null}: {estimated(row.nulls[row.difference.null])}"
        less = estimated(row.difference.estimate)
    elif row.nulls:
        null = ", ".join(f"{name}: {estimated(value)}" for name, value in row.nulls.items())
    if row.p_value is not None:
        less += f", p = {number(row.p_value, 2)}"
    return _line(row.title) + _ARROWS[row.better], estimated(row.value), null, less


def _limits(facts: CardFacts) -> str:
    licence = f"`{_line(facts.license)}`" if facts.license else "Not stated by whoever published it"
    return (
        "## What it does not say\n\n"
        "A feature that fires on a concept is no proof that the model uses it. Test that with "
        "controls: `visae intervene`.\n\n"
        f"## Licence\n\n{licence}. That of the model and of the images is theirs."
    )


def _python(*lines: str) -> str:
    return "\n".join(("```python", "from visae import load_sae", "", *lines, "```"))


def _table(head: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> str:
    rows = [head, ("---",) * len(head), *lines]
    return "\n".join("| " + " | ".join(_cell(text) for text in row) + " |" for row in rows)


def _line(text: str) -> str:
    """A text that cannot break out of its line, of code or into HTML."""
    return " ".join(text.split()).replace("`", "'").replace("<", "&lt;")


def _cell(text: str) -> str:
    """A line, code allowed, that cannot break out of its cell."""
    return " ".join(text.split()).replace("\\", "/").replace("|", "\\|")
