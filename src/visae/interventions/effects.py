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
    """The SAE, on the model's device."""
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
    """
    parts: list[dict[str, Tensor]] = []
    done = 0
    if partial_dir is not None:
        for path in sorted(partial_dir.glob("*.safetensors")):
            parts.append(read_tensors(path))
            done += parts[-1]["rows"].shape[0]
            advance(done)
    lab = laboratory
    remaining = list(rows)[done:]
    for batch in traced_images(lab.store, lab.source, lab.model, lab.site, remaining):
        part = _measure_batch(lab, batch, condition)
        if partial_dir is not None:
            write_tensors(partial_dir, f"{done:08d}.safetensors", part)
        parts.append(part)
        done += len(batch.rows)
        advance(done)
    return Effects(**{name: torch.cat([p[name] for p in parts]) for name in parts[0]})


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
    changed = (push.amounts != 0).any(dim=1)
    for image in torch.nonzero(changed).flatten().tolist():
        logits[image] = _pushed_logits(lab, batch.trace, push, image, everything)
    return {
        "rows": torch.tensor(batch.rows),
        "baseline": baseline.cpu(),
        "edited": logits[:, 0].cpu(),
        "controls": logits[:, 1:].cpu(),
        **_sizes(push),
    }


def _pushed_logits(
    lab: Laboratory, trace: Trace, push: Push, image: int, directions: Tensor
) -> Float[Tensor, "direction class"]:
    """Logits of one image pushed along each direction."""
    amounts, parts = push.amounts[image : image + 1], []
    for start in range(0, directions.shape[0], _PUSHES_AT_ONCE):
        some = directions[start : start + _PUSHES_AT_ONCE]
        copies = torch.full((some.shape[0],), image, device=amounts.device)
        repeated = take(trace, lab.site, copies)
        pushed = apply_push(
            repeated.tokens[lab.site], amounts.expand(some.shape[0], -1), some.unsqueeze(1)
        )
        parts.append(lab.task.logits(lab.model.resume(repeated, lab.site, pushed)))
    return torch.cat(parts)


def _sizes(push: Push) -> dict[str, Tensor]:
    moved = push.amounts != 0
    n_changed = moved.sum(dim=1)
    total = (push.relative_norm * moved).sum(dim=1)
    return {
        "relative_norm": (total / n_changed.clamp_min(1)).cpu(),
        "n_changed": n_changed.cpu(),
        "n_off_distribution": push.off_distribution.sum(dim=1).cpu(),
    }
