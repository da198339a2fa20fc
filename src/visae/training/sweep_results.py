"""The table of a sweep: a row an SAE, with its settings, its figures, and which one is chosen.

Written beside the SAEs as ``results.parquet``, ``results.csv`` and ``sweep.json``, which states
the rule of the choice. The figures are those of the last training step, whose batch was the same
for all SAEs.
"""

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table

from visae.errors import CheckpointError
from visae.saes.checkpoint import read_sae_record
from visae.storage.atomic import atomic_path, write_text
from visae.storage.records import to_plain, write_record
from visae.training.choosing import Candidate, ChoiceRule, choose, front
from visae.training.config import RunConfig
from visae.training.metrics import read_metrics

__all__ = ["SitesChoice", "SweepResult", "SweepRow", "sweep_result"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepRow:
    """One SAE of a sweep."""

    name: str
    """Name of the SAE and of its folder."""
    site: str
    """The site it reads."""
    target_site: str | None
    """The site it gives, of a transcoder."""
    kind: str
    """Sparsity kind."""
    k: int | None
    """k of topk and batch-topk."""
    target_l0: float | None
    """Active features aimed at, of jumprelu."""
    penalty: float | None
    """λ of relu, gated and jumprelu."""
    n_features: int
    """Number of features."""
    matryoshka: bool
    """Whether nested prefixes reconstruct too."""
    archetypal: bool
    """Whether its decoder is made of archetypes."""
    control: str
    """Which control it is; ``none`` for an SAE."""
    learning_rate: float
    """Peak learning rate."""
    seed: int
    """Seed of its initialisation."""
    n_tokens: int
    """Tokens it was trained on."""
    nmse: float | None = None
    """Normalised mean squared error at the end of training; none of what does not learn."""
    l0: float | None = None
    """Active features per token."""
    dead: int | None = None
    """Dead features."""
    dead_share: float | None = None
    """Share of them."""
    dense_share: float | None = None
    """Share of features that fire on more than a tenth of the tokens."""
    on_front: bool = False
    """Whether no other SAE of its sites has less NMSE at no larger L0."""
    chosen: bool = False
    """Whether the rule chooses it."""

    @property
    def sites(self) -> str:
        """What it reads and gives; errors can be compared among SAEs of the same."""
        return self.site if self.target_site is None else f"{self.site} to {self.target_site}"

    @property
    def candidate(self) -> Candidate | None:
        """Its figures for the choice; None of a control."""
        shares = (self.nmse, self.l0, self.dead_share, self.dense_share)
        if self.control != "none" or None in shares:
            return None
        nmse, l0, dead, dense = (float(share or 0.0) for share in shares)
        return Candidate(name=self.name, nmse=nmse, l0=l0, dead_share=dead, dense_share=dense)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SitesChoice:
    """What was chosen among the SAEs of the same sites."""

    sites: str
    """The site they read, and of transcoders the one they give."""
    chosen: str | None
    """Name of the SAE chosen; None where none is within the rule's bounds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepResult:
    """The SAEs of a sweep, and those chosen by the rule."""

    kind: str = "sweep"
    """What the file is."""
    format: int = 1
    """Version of the file's format."""
    rule: ChoiceRule
    """The rule's bounds."""
    rule_text: str
    """The rule as a phrase."""
    choices: tuple[SitesChoice, ...]
    """One for every site, or pair of sites, of the sweep."""
    rows: tuple[SweepRow, ...]
    """The SAEs, in the order of the sweep."""

    def write(self, folder: Path) -> None:
        """Write ``sweep.json``, ``results.csv`` and ``results.parquet`` into a folder."""
        rows = [to_plain(row) for row in self.rows]
        with atomic_path(folder / "results.parquet") as path:
            pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), path)
        text = io.StringIO()
        lines = csv.DictWriter(text, fieldnames=_SCHEMA.names, lineterminator="\n")
        lines.writeheader()
        lines.writerows(rows)
        write_text(folder / "results.csv", text.getvalue())
        write_record(folder / "sweep.json", self)

    def table(self) -> Table:
        """The figures for the terminal; * marks the SAE chosen, and + the front."""
        table = Table(title="Sweep", title_justify="left")
        for heading in ("SAE", "", "NMSE", "L0", "dead", "dense"):
            table.add_column(heading, overflow="fold")
        for row in self.rows:
            mark = "*" if row.chosen else "+" if row.on_front else ""
            table.add_row(row.name, mark, *_texts(row))
        return table


def sweep_result(runs: Sequence[RunConfig], out: Path, rule: ChoiceRule) -> SweepResult:
    """The figures of trained SAEs, each in ``out / run.name``, and the choice among them.

    Raises:
        CheckpointError: when an SAE is missing or damaged.
    """
    rows = [_row(run, out / run.name) for run in runs]
    marked: dict[str, SweepRow] = {row.name: row for row in rows}
    choices = []
    for sites in dict.fromkeys(row.sites for row in rows):
        rivals = [row.candidate for row in rows if row.sites == sites]
        candidates = [rival for rival in rivals if rival is not None]
        best, unbeaten = choose(candidates, rule), front(candidates)
        choices.append(SitesChoice(sites=sites, chosen=best))
        for name in unbeaten | ({best} if best is not None else set()):
            marked[name] = dataclasses.replace(
                marked[name], on_front=name in unbeaten, chosen=name == best
            )
    return SweepResult(
        rule=rule, rule_text=rule.text, choices=tuple(choices), rows=tuple(marked.values())
    )


def _row(run: RunConfig, folder: Path) -> SweepRow:
    record = read_sae_record(folder)
    made, plain = record.provenance, to_plain(run.sparsity)
    return SweepRow(
        name=run.name,
        site=made.site,
        target_site=made.target_site,
        kind=run.sparsity.kind,
        k=plain.get("k"),
        target_l0=plain.get("target_l0"),
        penalty=plain.get("l1", plain.get("l0_weight")),
        n_features=record.n_features,
        matryoshka=run.matryoshka,
        archetypal=run.archetypes is not None,
        control=run.control,
        learning_rate=made.recipe["peak_learning_rate"],
        seed=run.seed,
        n_tokens=made.n_tokens,
        **(_figures(folder, record.n_features) if run.learns else {}),
    )


def _figures(folder: Path, n_features: int) -> dict[str, Any]:
    lines = read_metrics(folder)
    if not lines:
        raise CheckpointError(
            "The figures of this SAE's training are gone",
            where=folder / "metrics.jsonl",
            fix="Restore the file, or delete the folder and train it again",
        )
    last = lines[-1]
    return {
        "nmse": float(last["nmse"]),
        "l0": float(last["l0"]),
        "dead": int(last["dead"]),
        "dead_share": last["dead"] / n_features,
        "dense_share": float(last["dense_share"]),
    }


def _texts(row: SweepRow) -> list[str]:
    if row.nmse is None:
        return [row.control, "", "", ""]
    return [
        f"{row.nmse:.4f}",
        f"{row.l0:.1f}",
        f"{row.dead_share:.1%}",
        f"{row.dense_share:.1%}",
    ]


_SCHEMA = pa.schema(
    {
        "name": pa.string(),
        "site": pa.string(),
        "target_site": pa.string(),
        "kind": pa.string(),
        "k": pa.int64(),
        "target_l0": pa.float64(),
        "penalty": pa.float64(),
        "n_features": pa.int64(),
        "matryoshka": pa.bool_(),
        "archetypal": pa.bool_(),
        "control": pa.string(),
        "learning_rate": pa.float64(),
        "seed": pa.int64(),
        "n_tokens": pa.int64(),
        "nmse": pa.float64(),
        "l0": pa.float64(),
        "dead": pa.int64(),
        "dead_share": pa.float64(),
        "dense_share": pa.float64(),
        "on_front": pa.bool_(),
        "chosen": pa.bool_(),
    }
)
