"""Directions to compare an edit with: on the same images and tokens, at the same norm.

Random directions ask whether any push of this size does it; decoder directions of matched live
features ask whether any feature does. Source: RIGOR §3, controls 1 and 3.
"""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visae.interventions.discovery import Profiles, matched_features
from visae.interventions.spec import ControlsConfig
from visae.saes.initialise import random_rows
from visae.saes.sae import SAE

__all__ = ["ControlFamily", "control_families", "random_directions"]


@dataclasses.dataclass(frozen=True)
class ControlFamily:
    """Directions of one kind."""

    name: str
    """What they are: ``random directions`` or ``matched features``."""
    directions: Float[Tensor, "draw d_model"]
    """Unit vectors."""
    members: tuple[int, ...]
    """Feature numbers, for matched features; empty otherwise."""


def control_families(
    sae: SAE, profiles: Profiles, feature: int, config: ControlsConfig, *, seed: int
) -> list[ControlFamily]:
    """The families that the spec asks for; random ones are fixed by the seed."""
    families = []
    if config.n_random:
        families.append(random_directions(config.n_random, sae.d_model, seed=seed))
    if config.n_matched:
        members = matched_features(profiles, feature, config.n_matched)
        rows = nn.functional.normalize(sae.W_dec[members].detach().cpu(), dim=1)
        families.append(ControlFamily("matched features", rows, tuple(members)))
    return families


def random_directions(n: int, d_model: int, *, seed: int) -> ControlFamily:
    """Isotropic random directions, fixed by their number and the seed."""
    generator = torch.Generator().manual_seed(seed)
    return ControlFamily("random directions", random_rows(n, d_model, generator), ())
