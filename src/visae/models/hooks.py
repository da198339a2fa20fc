"""Plain forward hooks, each held for one block of code: read, replace, or stand in for a module.

Some modules give a tuple; where ``main`` and ``with_main`` are used, its first element is meant.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

from torch import Tensor, nn

__all__ = ["Side", "first_argument", "main", "reading", "rewriting", "standing_in", "with_main"]

Side = Literal["input", "output"]


@contextlib.contextmanager
def reading(module: nn.Module, side: Side, see: Callable[[Any], None]) -> Iterator[None]:
    """Let ``see`` have the module's output, or its first argument, each time it runs."""
    if side == "output":
        handle = module.register_forward_hook(lambda _module, _inputs, output: see(output))
    else:
        handle = module.register_forward_pre_hook(
            lambda _module, inputs, named: see(first_argument(inputs, named)), with_kwargs=True
        )
    with _held(handle):
        yield


@contextlib.contextmanager
def rewriting(module: nn.Module, side: Side, change: Callable[[Any], Any]) -> Iterator[None]:
    """Let the module give ``change(output)`` instead, or take ``change(first argument)``."""

    def give(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        return change(output)

    def take(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        changed = change(first_argument(inputs, named))
        if inputs:
            return (changed, *inputs[1:]), named
        return inputs, {**named, next(iter(named)): changed}

    if side == "output":
        handle = module.register_forward_hook(give)
    else:
        handle = module.register_forward_pre_hook(take, with_kwargs=True)
    with _held(handle):
        yield


@contextlib.contextmanager
def standing_in(module: nn.Module, substitute: Callable[..., Any]) -> Iterator[None]:
    """Let ``substitute`` run in the module's stead; the module itself does no work."""
    had_its_own = "forward" in vars(module)
    before = module.forward
    module.forward = substitute
    try:
        yield
    finally:
        if had_its_own:
            module.forward = before
        else:
            del module.forward


def first_argument(inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """A module's first argument, given by position or by name."""
    return inputs[0] if inputs else next(iter(named.values()))


def main(value: Any) -> Any:
    """The value itself, or the first element of a tuple or list."""
    return value[0] if isinstance(value, tuple | list) and value else value


def with_main(value: Any, replacement: Tensor) -> Any:
    """The same structure with another first element."""
    if not isinstance(value, tuple | list):
        return replacement
    return type(value)((replacement, *value[1:]))


@contextlib.contextmanager
def _held(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
