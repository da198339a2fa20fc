"""What has to be known about a network for its tokens to be read and edited: one small record.

An adapter (timm, open_clip, transformers, a user's own network) describes its network once as an
``Architecture``; ``visae.models.hooked.HookedModel`` makes a ``VisionModel`` of it.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from visae.models.layout import Layout
from visae.models.protocol import Output
from visae.models.shapes import Form

__all__ = ["Architecture", "Block", "Heads"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heads:
    """Where a block's attention head outputs are: what its output projection takes."""

    projection: nn.Module
    """The attention's output projection; its input is the heads' outputs, one after another."""
    n_heads: int
    """Number of attention heads; they divide the projection's input into equal parts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """One block of a residual stream and its parts; a part that is None is no site."""

    module: nn.Module
    """The block; its output (or the first of a tuple) is the residual activation."""
    mlp: nn.Module | None = None
    """Its output (or the first of a tuple) is what the block's MLP adds to the residual stream."""
    attention: nn.Module | None = None
    """Its output (or the first of a tuple) is what the attention adds to the residual stream."""
    heads: Heads | None = None
    """The attention's heads, where it has an output projection that is a module it calls."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """A network, how it runs, and which of its modules are what."""

    network: nn.Module
    """The whole network."""
    forward: Callable[[Tensor], Output]
    """The plain pass from pixels (image, 3, height, width)."""
    blocks: tuple[Block, ...] = ()
    """The blocks of the residual stream, in the order in which they run."""
    is_chain: bool = False
    """Whether blocks can be left out of a pass: each takes the tokens of the one before as its
    first argument; nothing but these tokens, as they come out of the last block, tells the rest
    of the network about the image; what else a block takes or gives is the same for all images."""
    stem: nn.Module | None = None
    """The module that makes patches of pixels (first argument), of each image by itself."""
    special: tuple[str, ...] = ()
    """Names of the special tokens, which come first: ``cls``, ``register0``, …"""
    grids: tuple[tuple[int, int], ...] = ()
    """Rows and columns that the patches may have; the first that fits a site's tokens is it."""
    patch_size: tuple[int, int] | None = None
    """Height and width of a patch in pixels, where the patches of the first of ``grids`` lie side
    by side from the top left corner."""
    stages: tuple[str, ...] = ()
    """Module paths that are listed as sites where no part of a block is one."""
    usual_form: Form = "channels first"
    """Where feature maps have their channels, if their shape leaves it open."""
    layouts: Mapping[str, Layout] = dataclasses.field(default_factory=dict)
    """Layouts of module paths where they are known beforehand; such a module may give a tuple, of
    which the first element is meant."""
    no_heads: str = "its blocks have no attention with an output projection of its own"
    """Why there are no attention heads to be had, where no block has any."""

    @property
    def device(self) -> torch.device:
        """Where the network's weights are."""
        return self._tensor().device

    def blank(self, n_images: int, size: tuple[int, int]) -> Tensor:
        """Black images as pixels, on the network's device, in the memory of one."""
        one = torch.zeros(1, 3, *size, device=self.device, dtype=self._tensor().dtype)
        return one.expand(n_images, -1, -1, -1)

    def _tensor(self) -> Tensor:
        """One of the network's weights, or of its buffers where it has none."""
        tensors = itertools.chain(self.network.parameters(), self.network.buffers())
        floating = (tensor for tensor in tensors if tensor.is_floating_point())
        return next(floating, torch.zeros(()))
