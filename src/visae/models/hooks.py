"""Plain forward hooks, each held for one block: read what a module gives or takes, or replace it.

What is read is a copy where later layers may work in place; what replaces an output is a copy for
the same reason.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from visae.errors import ModelError

__all__ = ["capture_input", "capture_output", "replace_output"]


@contextlib.contextmanager
def capture_output(module: nn.Module, into: dict[str, Tensor], site: str) -> Iterator[None]:
    """Write a copy of what the module gives to ``into[site]``.

    Raises:
        ModelError: when the module runs twice, gives something else than one tensor, or (at the
            end of the block) never ran.
    """

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if site in into or not isinstance(output, Tensor):
            what = "runs more than once" if site in into else f"gives a {type(output).__name__}"
            raise _no_site(site, what)
        into[site] = output.clone()

    handle = module.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()
    if site not in into:
        raise _no_site(site, "does not run")


@contextlib.contextmanager
def capture_input(module: nn.Module, into: dict[str, Tensor], site: str) -> Iterator[None]:
    """Write the module's first input to ``into[site]``; it must not be changed in place."""

    def keep(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        into[site] = inputs[0]

    handle = module.register_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def replace_output(module: nn.Module, replacement: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let the module give a copy of ``replacement(output)`` instead."""
    handle = module.register_forward_hook(
        lambda _module, _inputs, output: replacement(output).clone()
    )
    try:
        yield
    finally:
        handle.remove()


def _no_site(site: str, what: str) -> ModelError:
    return ModelError(
        f"The module {site} {what} in a forward pass",
        fix="Choose a module that gives one tensor, once: tokens or a feature map",
    )
