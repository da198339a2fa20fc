"""The order in which the tokens of some images are drawn, so that every batch mixes the images.

Tokens come in rounds. In each round every image gives one token, at a random position that it has
not given before. The order of the images changes from round to round, but no image comes back
before half of the others have come. A run of tokens thus holds as many different images as it has
tokens, or all images about equally often: it is never less mixed than tokens drawn at random.
Main names: ``even_order``, ``uneven_order``.
"""

import itertools

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

__all__ = ["even_order", "seeded", "uneven_order"]


def even_order(
    n_images: int, positions: Int64[Tensor, " position"], *, stride: int, generator: torch.Generator
) -> Int64[Tensor, " token"]:
    """Tokens of images that all give the same positions, as image · stride + position.

    Round r takes from image i the position π[(r + o_i) mod n], of one permutation π of the
    positions and random offsets o_i, of which each comes equally often.
    """
    n = len(positions)
    shuffled = positions[torch.randperm(n, generator=generator)].repeat(2)
    offsets = torch.randperm(n_images, generator=generator) % max(1, n)
    stirred = torch.randperm(n_images, generator=generator)
    images = torch.empty((n, n_images), dtype=torch.int64)
    for number in range(n):
        images[number] = stirred
        _stir(stirred, number, generator)
    rounds = offsets[images].add_(torch.arange(n)[:, None])
    return images.mul_(stride).add_(shuffled[rounds]).flatten()


def _stir(images: Int64[Tensor, " image"], number: int, generator: torch.Generator) -> None:
    """Shuffle the halves, or in every other round the middle half and the outer quarters."""
    n = len(images)
    cuts = (0, n // 2, n) if number % 2 == 0 else (0, n // 4, 3 * n // 4, n)
    for start, stop in itertools.pairwise(cuts):
        images[start:stop] = images[start:stop][torch.randperm(stop - start, generator=generator)]


def uneven_order(
    chosen: Bool[Tensor, "image position"], *, generator: torch.Generator
) -> Int64[Tensor, " token"]:
    """The chosen tokens of images that give different numbers, as image · n_positions + position.

    The tokens of an image with n of them are drawn in random order, the r-th at the time
    (r + u)/n with a random u in [0, 1) of the image: however many there are, they are spread
    evenly over the whole.
    """
    images, positions = chosen.nonzero(as_tuple=True)
    shuffle = torch.randperm(len(images), generator=generator)
    images, positions = images[shuffle], positions[shuffle]
    by_image = images.argsort(stable=True)
    images, positions = images[by_image], positions[by_image]
    counts = chosen.sum(1)
    rank = torch.arange(len(images)) - (counts.cumsum(0) - counts)[images]
    phase = torch.rand(len(chosen), dtype=torch.float64, generator=generator)
    time = (rank + phase[images]) / counts[images]
    return (images * chosen.shape[1] + positions)[time.argsort()]


def seeded(*numbers: int) -> torch.Generator:
    """A generator that is fixed by several numbers together."""
    mixed = np.random.SeedSequence([number % 2**64 for number in numbers]).generate_state(1)
    return torch.Generator().manual_seed(int(mixed[0]))
