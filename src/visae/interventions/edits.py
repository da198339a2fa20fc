"""Edits of features inside the model, with the reconstruction error preserved.

    x' = x + Σ_j (f'_j − f_j) · s · W_dec,j       at the chosen tokens

This equals decoding the edited features and adding the reconstruction error back, costs no
decode and changes nothing else: a token at which no feature changes is returned bit for bit.
Source: RIGOR §1.
"""

import dataclasses
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from visae.errors import ExperimentError
from visae.models.layout import Layout
from visae.saes.sae import SAE

__all__ = ["Edit", "Push", "apply_push", "plan_push", "scope_tokens"]

_OFF_DISTRIBUTION = 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edit:
    """One feature's change, in raw units."""

    feature: int
    """Number of the feature."""
    operation: Literal["ablate", "scale", "set", "add"]
    """What happens to its activation."""
    value: float = 0.0
    """Factor of ``scale``, target of ``set``, amount of ``add``."""

    def target(self, active: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The activation after the edit. It may be negative where a dose flips the sign."""
        if self.operation == "ablate":
            return torch.zeros_like(active)
        if self.operation == "scale":
            return active * self.value
        if self.operation == "set":
            return torch.full_like(active, self.value)
        return active + self.value


class Push(NamedTuple):
    """How far, along which direction, each token moves: a rank-one change of the activations."""

    amounts: Float[Tensor, "image token"]
    """Signed length of the move at each token; 0 where nothing changes."""
    direction: Float[Tensor, " d_model"]
    """Unit vector."""
    relative_norm: Float[Tensor, "image token"]
    """‖Δx‖ / ‖x‖."""
    off_distribution: Bool[Tensor, "image token"]
    """Where the new activation is beyond twice the largest one observed, or below zero."""


def scope_tokens(layout: Layout, scope: str) -> Bool[Tensor, " token"]:
    """Tokens that a scope allows to change (``active-patches`` is narrowed where it is used).

    Raises:
        ExperimentError: for ``special`` where the model has no special tokens.
    """
    allowed = torch.zeros(layout.n_tokens, dtype=torch.bool)
    if scope in ("special", "all"):
        allowed[: layout.n_special] = True
    if scope in ("patches", "active-patches", "all"):
        allowed[layout.n_special :] = True
    if not allowed.any():
        raise ExperimentError(
            "The scope holds no token: this model has no special tokens",
            where=f"edit.scope = {scope}",
            fix="Use the scope patches",
        )
    return allowed


def plan_push(
    sae: SAE,
    tokens: Float[Tensor, "image token d_model"],
    edit: Edit,
    allowed: Bool[Tensor, " token"],
    *,
    active_only: bool = False,
    observed_max: float = float("inf"),
) -> Push:
    """The move that an edit means for the activations of some images.

    Args:
        sae: The SAE whose feature is edited.
        tokens: Raw activations at its site, all tokens.
        edit: What to change.
        allowed: Tokens that may change.
        active_only: Change only tokens where the feature fires.
        observed_max: The feature's largest observed activation.
    """
    n_images, n_tokens, d_model = tokens.shape
    flat = tokens.reshape(-1, d_model).to(sae.W_dec.device, torch.float32)
    active = sae.feature_activations(flat, [edit.feature])[:, 0].to(tokens.device)
    active = active.reshape(n_images, n_tokens)
    changes = allowed.to(tokens.device).expand(n_images, -1)
    if active_only:
        changes = changes & (active > 0)
    target = torch.where(changes, edit.target(active), active)
    row = sae.W_dec[edit.feature].detach().to(tokens.device)
    length = row.norm()
    amounts = (target - active) * sae.scale.to(tokens.device) * length
    size = tokens.norm(dim=2).clamp_min(torch.finfo(torch.float32).tiny)
    moved = amounts != 0
    beyond = (target > _OFF_DISTRIBUTION * observed_max) | (target < 0)
    return Push(amounts, row / length, amounts.abs() / size, beyond & moved)


def apply_push(
    tokens: Float[Tensor, "image token d_model"],
    amounts: Float[Tensor, "image token"],
    direction: Float[Tensor, "*#image_token d_model"],
) -> Float[Tensor, "image token d_model"]:
    """Activations moved along a direction, or one direction an image (image, 1, d_model).

    Tokens with amount 0 are returned bit for bit.
    """
    moved = tokens + amounts.unsqueeze(2) * direction
    return torch.where((amounts != 0).unsqueeze(2), moved, tokens)
