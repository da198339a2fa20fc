"""Run edits and their controls on images: pushes in, class logits out, resumable by batch.

Every push of a batch of images goes through the part of the network after the site, and nothing
else is run again. Images at which an edit changes nothing keep their baseline exactly.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from visae.activations.store import ActivationStore
from visae.errors import ExperimentError
from visae.images.source import ImageSource
from visae.interventions.batches import TracedImages, take, traced_images
from visae.interventions.edits import Edit, Push, apply_push, plan_push
from visae.interventions.tasks import Task
from visae.models.protocol import Trace, VisionModel
from visae.saes.sae import SAE
from visae.storage.tensors import read_tensors, write_tensors

__all__ = ["Condition", "Effects", "Laboratory", "measure"]

_PUSHES_AT_ONCE = 64


@dataclasses.dataclass(frozen=True)
class Laboratory:
    """Everything an experiment runs on."""

    store: ActivationStore
    """The images, with labels and content ids."""
    source: ImageSource
    """Their pixels."""
    model: VisionModel
    """The frozen vision model."""
    site: str
    """Where the SAE sits."""
    sae: SAE
    """The SAE; fastest on the model's device."""
    task: Task
    """What reads the output."""


@dataclasses.dataclass(frozen=True)
class Condition:
    """An edit, and the directions that replace the feature's own as controls."""

    edit: Edit
    """What happens to the feature."""
    allowed: Bool[Tensor, " token"]
    """Tokens that may change."""
    active_only: bool
    """Change only tokens where the feature fires."""
    observed_max: float
    """The feature's largest activation on the discovery images."""
    directions: Float[Tensor, "draw d_model"]
    """Control directions; each moves the same tokens by the same signed length."""


@dataclasses.dataclass(frozen=True)
class Effects:
    """Logits of images without the edit, with it, and under each control."""

    rows: Int64[Tensor, " image"]
    """Rows of the images in the store."""
    baseline: Float[Tensor, "image class"]
    """Logits of the unedited model."""
    edited: Float[Tensor, "image class"]
    """Logits under the edit."""
    controls: Float[Tensor, "image draw class"]
    """Logits under each control direction."""
    relative_norm: Float[Tensor, " image"]
    """Mean ‖Δx‖ / ‖x‖ over the tokens that changed; 0 where none did."""
    n_changed: Int64[Tensor, " image"]
    """Tokens that changed."""
    n_off_distribution: Int64[Tensor, " image"]
    """Changed tokens whose new activation is off-distribution."""


def measure(
    laboratory: Laboratory,
    rows: Sequence[int],
    condition: Condition,
    *,
    partial_dir: Path | None = None,
    advance: Callable[[int], None] = lambda _n: None,
) -> Effects:
    """The effects of a condition on some images.

    With ``partial_dir`` each finished batch is kept there, and found again by an interrupted
    run. ``advance`` is told the number of images done after each batch.

    Raises:
        ExperimentError: when there are no images, one has changed since it was recorded, or
            ``partial_dir`` holds other images.
    """
    if not rows:
        raise ExperimentError("There are no images to measure", fix="Give more images")
    lab = laboratory
    parts = [] if partial_dir is None else _finished_batches(partial_dir, rows)
    done = sum(part["rows"].shape[0] for part in parts)
    advance(done)
    for batch in traced_images(lab.store, lab.source, lab.model, lab.site, rows[done:]):
        part = _measure_batch(lab, batch, condition)
        if partial_dir is not None:
            write_tensors(partial_dir, f"{done:08d}.safetensors", part)
        parts.append(part)
        done += len(batch.rows)
        advance(done)
    return Effects(**{name: torch.cat([p[name] for p in parts]) for name in parts[0]})


def _finished_batches(folder: Path, rows: Sequence[int]) -> list[dict[str, Tensor]]:
    """The batches that an interrupted run has left, in order."""
    parts: list[dict[str, Tensor]] = []
    found: list[int] = []
    for path in sorted(folder.glob("*.safetensors")):
        parts.append(read_tensors(path, error=ExperimentError))
        found += parts[-1]["rows"].tolist()
        if found != list(rows[: len(found)]):
            raise ExperimentError(
                "An interrupted run has left the effects of other images here",
                where=path,
                fix=f"Delete the folder {folder} and run the same command again",
            )
    return parts


def _measure_batch(lab: Laboratory, batch: TracedImages, condition: Condition) -> dict[str, Tensor]:
    """Baseline, edit and controls of one batch of images, on the CPU."""
    tokens = batch.trace.tokens[lab.site]
    push = plan_push(
        lab.sae,
        tokens,
        condition.edit,
        condition.allowed,
        active_only=condition.active_only,
        observed_max=condition.observed_max,
    )
    baseline = lab.task.logits(batch.trace.output)
    directions = condition.directions.to(tokens.device, tokens.dtype)
    everything = torch.cat([push.direction.unsqueeze(0), directions])
    logits = baseline.unsqueeze(1).repeat(1, everything.shape[0], 1)
    changed = torch.nonzero((push.amounts != 0).any(dim=1)).flatten()
    logits[changed] = _pushed_logits(lab, batch.trace, push, changed, everything)
    return {
        "rows": torch.tensor(batch.rows),
        "baseline": baseline.cpu(),
        "edited": logits[:, 0].cpu(),
        "controls": logits[:, 1:].cpu(),
        **_sizes(push),
    }


def _pushed_logits(
    lab: Laboratory,
    trace: Trace,
    push: Push,
    images: Int64[Tensor, " changed"],
    directions: Float[Tensor, "direction d_model"],
) -> Float[Tensor, "changed direction class"]:
    """Logits of some images, each pushed along each direction; many pushes run at once."""
    n_directions = directions.shape[0]
    pairs = torch.arange(len(images) * n_directions, device=images.device)
    parts = [trace.output.tokens.new_zeros(0, len(lab.task.classes))]
    for some in filter(len, torch.split(pairs, _PUSHES_AT_ONCE)):  # of no pairs: one part of none
        copies = take(trace, lab.site, images[some // n_directions])
        amounts = push.amounts[images[some // n_directions]]
        along = directions[some % n_directions].unsqueeze(1)
        pushed = apply_push(copies.tokens[lab.site], amounts, along)
        parts.append(lab.task.logits(lab.model.resume(copies, lab.site, pushed)))
    shape = len(images), n_directions, len(lab.task.classes)
    return torch.cat(parts).reshape(shape)


def _sizes(push: Push) -> dict[str, Tensor]:
    moved = push.amounts != 0
    n_changed = moved.sum(dim=1)
    total = (push.relative_norm * moved).sum(dim=1)
    return {
        "relative_norm": (total / n_changed.clamp_min(1)).cpu(),
        "n_changed": n_changed.cpu(),
        "n_off_distribution": push.off_distribution.sum(dim=1).cpu(),
    }
