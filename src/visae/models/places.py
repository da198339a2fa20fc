"""From the name of a site to a place in the network: which module, and which side of it.

``residual@9``, ``mlp@9`` and ``attention@9`` are outputs of parts of block 9; ``heads@9`` is the
input of its attention's output projection (the outputs of all heads, one after another) and
``heads@9.3`` head 3's part of that; anything else is a module path.
"""

import re
from typing import NamedTuple

import torch
from torch import Tensor, nn

from visae.errors import ModelError, nearest_names
from visae.models.architecture import Architecture, Block
from visae.models.hooks import Side, main, with_main

__all__ = ["Place", "find_place", "named_sites"]

_BLOCK_SITE = re.compile(r"(residual|mlp|attention|heads)@(0|[1-9][0-9]*)(?:\.(0|[1-9][0-9]*))?")


class Place(NamedTuple):
    """Where a site is in the network."""

    module: nn.Module
    """The module whose output or input it is."""
    side: Side = "output"
    """Which of the two."""
    block: int | None = None
    """The block that it is in, or None where it is in none."""
    is_residual: bool = False
    """Whether it is the block's own output."""
    may_be_tuple: bool = False
    """Whether the first element of a tuple is meant."""
    head: tuple[int, int] | None = None
    """Which attention head of how many it is."""

    def get(self, value: object) -> object:
        """The site's part of what the module gives or takes, not copied."""
        found = main(value) if self.may_be_tuple else value
        if self.head is None or not isinstance(found, Tensor):
            return found
        return found.chunk(self.head[1], dim=-1)[self.head[0]]

    def put(self, value: object, replacement: Tensor) -> object:
        """What the module gives or takes with the site's part replaced; nothing is changed."""
        whole = main(value) if self.may_be_tuple else value
        if self.head is not None and isinstance(whole, Tensor):
            parts = list(whole.chunk(self.head[1], dim=-1))
            parts[self.head[0]] = replacement
            changed = torch.cat(parts, dim=-1)
        else:
            changed = replacement.clone()
        return with_main(value, changed) if self.may_be_tuple else changed


def named_sites(architecture: Architecture) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The parts of the blocks, block by block, and the stages that are modules of the network.

    Single heads (``heads@9.3``) and other module paths are accepted besides.
    """
    of_blocks = (
        f"{kind}@{index}"
        for index, block in enumerate(architecture.blocks)
        for kind, part in _parts(block).items()
        if part is not None
    )
    modules = {path for path, _ in architecture.network.named_modules() if path}
    return tuple(of_blocks), tuple(stage for stage in architecture.stages if stage in modules)


def find_place(architecture: Architecture, site: str, name: str) -> Place:
    """The place of a site in a network, which errors call ``name``.

    Raises:
        ModelError: when there is no such site, with the nearest ones or the reason.
    """
    if found := _in_block(architecture, site):
        return found
    modules = dict(architecture.network.named_modules())
    if site and site in modules:
        place = _of_module(architecture, modules[site])
        return place._replace(may_be_tuple=place.may_be_tuple or site in architecture.layouts)
    where = _numbers(architecture, site)
    if site.startswith("heads@") and not any(block.heads for block in architecture.blocks):
        raise ModelError(
            f"{name} has no site {site}: {architecture.no_heads}",
            where=where,
            fix="Use attention, mlp or residual sites, or a module path",
        )
    options = (*named_sites(architecture)[0], *filter(None, modules))
    raise ModelError(
        f"{name} has no site {site}",
        where=where,
        fix=f"Use one of: {nearest_names(site, options)}",
    )


def _parts(block: Block) -> dict[str, Place | None]:
    """The place of each kind of site in a block, but for single heads."""
    parts = {"mlp": block.mlp, "attention": block.attention}
    of_parts = {
        kind: None if part is None else Place(part, may_be_tuple=True)
        for kind, part in parts.items()
    }
    heads = None if block.heads is None else Place(block.heads.projection, "input")
    residual = Place(block.module, is_residual=True, may_be_tuple=True)
    return {"residual": residual, **of_parts, "heads": heads}


def _in_block(architecture: Architecture, site: str) -> Place | None:
    """The place of a site named by kind and block, if there is one."""
    parsed = _BLOCK_SITE.fullmatch(site)
    if parsed is None or int(parsed[2]) >= len(architecture.blocks):
        return None
    kind, index = parsed[1], int(parsed[2])
    block = architecture.blocks[index]
    place = _parts(block)[kind]
    if place is None:
        return None
    if parsed[3] is not None:
        number = int(parsed[3])
        if kind != "heads" or block.heads is None or number >= block.heads.n_heads:
            return None
        place = place._replace(head=(number, block.heads.n_heads))
    return place._replace(block=index)


def _numbers(architecture: Architecture, site: str) -> str:
    """How many blocks there are, or heads where the block is right and its head is not."""
    n_blocks = len(architecture.blocks)
    parsed = _BLOCK_SITE.fullmatch(site)
    if parsed is not None and parsed[3] is not None and int(parsed[2]) < n_blocks:
        heads = architecture.blocks[int(parsed[2])].heads
        if parsed[1] == "heads" and heads is not None:
            return f"block {parsed[2]} has {heads.n_heads} heads, numbered from 0"
    return f"it has {n_blocks} blocks, numbered from 0" if n_blocks else "it has no blocks"


def _of_module(architecture: Architecture, module: nn.Module) -> Place:
    """The place of a module's output: in the block that holds the module, if one does."""
    for index, block in enumerate(architecture.blocks):
        if module is block.module:
            return Place(module, block=index, is_residual=True, may_be_tuple=True)
        if any(module is part for part in block.module.modules()):
            return Place(module, block=index)
    return Place(module)
