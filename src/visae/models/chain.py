"""A network's own pass, begun at a block: what is before the block is left out.

How blocks are called differs from family to family (rotary angles, masks, tuples), so a suffix of
the network is not rebuilt from its blocks. The network runs its own forward pass on blank pixels
instead, while the blocks before the site only hand on what they are given, which costs next to
nothing. That is exact for an ``Architecture`` that ``is_chain``.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from visae.models.architecture import Architecture
from visae.models.hooks import first_argument, main, reading, rewriting, standing_in, with_main
from visae.models.protocol import Output

__all__ = ["Chain"]


class Chain:
    """The blocks of a network that can be left out of a pass."""

    def __init__(self, architecture: Architecture, size: tuple[int, int]) -> None:
        self._architecture = architecture
        self._size = size

    def after(self, index: int, tokens: Tensor) -> Output:
        """The output when block ``index`` gives ``tokens``."""
        with contextlib.ExitStack() as stack:
            self._leave_out(index, stack)
            block = self._architecture.blocks[index].module
            give = functools.partial(_fill, self._outputs[index], tokens)
            stack.enter_context(standing_in(block, lambda *_inputs, **_named: give()))
            return self._run(len(tokens))

    def within(
        self, index: int, entry: Tensor, edit: contextlib.AbstractContextManager[None]
    ) -> Output:
        """The output when block ``index`` takes ``entry``, and ``edit`` is in force."""
        with contextlib.ExitStack() as stack:
            self._leave_out(index, stack)
            block = self._architecture.blocks[index].module
            stack.enter_context(rewriting(block, "input", lambda _: entry.clone()))
            stack.enter_context(edit)
            return self._run(len(entry))

    def _run(self, n_images: int) -> Output:
        return self._architecture.forward(self._architecture.blank(n_images, self._size))

    def _leave_out(self, n_blocks: int, stack: contextlib.ExitStack) -> None:
        """Let the stem work for one image only, and the first blocks give what they take."""
        stem = self._architecture.stem
        if stem is not None:
            stack.enter_context(standing_in(stem, _once(stem.forward)))
        for block, output in zip(
            self._architecture.blocks[:n_blocks], self._outputs[:n_blocks], strict=True
        ):
            stack.enter_context(standing_in(block.module, _pass_on(output)))

    @functools.cached_property
    def _outputs(self) -> tuple[Any, ...]:
        """What each block gives for one blank image, with its tokens left out."""
        seen: list[Any] = []
        with contextlib.ExitStack() as stack:
            for block in self._architecture.blocks:
                stack.enter_context(reading(block.module, "output", seen.append))
            self._run(1)
        return tuple(with_main(output, main(output).new_empty(0)) for output in seen)


def _once(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same for every image of a batch, worked out from the first."""

    def run(pixels: Tensor, *inputs: Any, **named: Any) -> Any:
        return _expand(forward(pixels[:1], *inputs, **named), len(pixels))

    return run


def _pass_on(output: Any) -> Callable[..., Any]:
    """A block that gives its first argument, in the structure of its own output."""
    return lambda *inputs, **named: _fill(output, first_argument(inputs, named))


def _fill(output: Any, tokens: Tensor) -> Any:
    """The tokens in the structure of a block's output, the rest of it as it was."""
    return with_main(_expand(output, len(tokens)), tokens)


def _expand(value: Any, n_images: int) -> Any:
    """What was made for one image, for so many."""
    if isinstance(value, tuple | list):
        return type(value)(_expand(part, n_images) for part in value)
    if isinstance(value, Tensor) and value.ndim > 0 and len(value) == 1:
        return value.expand(n_images, *value.shape[1:]).clone()
    return value
