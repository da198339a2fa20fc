"""Several processes that work as one, started by torchrun (or Slurm) and numbered by rank.

``joined_ranks`` reads torchrun's environment variables; without them there is one rank, and every
method does what it says for that one. Files are the ranks' common ground: they must share a folder.
"""

import contextlib
import dataclasses
import datetime as dt
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar, cast, final

from visae.errors import ConfigError, VisaeError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = ["Ranks", "joined_ranks"]

T = TypeVar("T")

_LONGEST_WAIT = dt.timedelta(days=7)  # a rank that dies ends the others through torchrun
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class _OtherRankFailedError(Exception):
    """Ends the work of a rank because another has failed; never seen outside this file."""


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those that work together."""

    rank: int = 0
    """Number of this process; rank 0 plans, gathers and speaks."""
    world_size: int = 1
    """Number of processes."""
    local_rank: int = 0
    """Number of this process on its machine, which is that of its GPU."""
    n_local: int = 1
    """Processes on this machine."""
    store: "Store | None" = None
    """Where counters and failures are kept; absent where there is one process."""
    counters: dict[str, int] = dataclasses.field(default_factory=dict)
    """The counters of one process alone."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def device(self, device: str) -> str:
        """The device a rank uses: with several on a machine, ``auto`` and ``cuda`` mean its own."""
        import torch

        if self.n_local > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local_rank}"
        return device

    def gather(self, value: T) -> list[T]:
        """Everyone's value, in the order of the ranks; each waits for all."""
        if self.world_size == 1:
            return [value]
        import torch.distributed

        found: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(found, value)
        return found

    def first(self, work: Callable[[], T]) -> T:
        """What ``work`` gives on rank 0, for all; a failure there is everyone's.

        Raises:
            VisaeError: that of rank 0.
        """
        done, failure = _attempt(work) if self.is_first else (None, None)
        outcome, failure = self.gather((done, failure))[0]
        if failure is not None:
            raise failure
        return cast(T, outcome)

    def together(self, work: Callable[[], None]) -> None:
        """Let every rank do its work; when one fails, the others stop at their next ``count``.

        After a failure the ranks have nothing more to do together.

        Raises:
            VisaeError: this rank's own, or that of the first rank that failed, naming it.
        """
        try:
            _, failure = _attempt(work, self._tell_failure)
        except _OtherRankFailedError:
            failure = None
        failures = self.gather(failure)
        if failure is not None:
            raise failure
        for rank, theirs in enumerate(failures):
            if theirs is not None:
                raise type(theirs)(
                    f"Rank {rank} of {self.world_size} failed: {theirs.what}",
                    where=theirs.where,
                    fix=theirs.fix,
                )

    def count(self, name: str, n_more: int) -> int:
        """Add to a counter that all ranks share, and give its value.

        Within ``together`` this is also where a rank stops because another has failed.
        """
        if self.store is None:
            self.counters[name] = self.counters.get(name, 0) + n_more
            return self.counters[name]
        if self.store.check(["failed"]):
            raise _OtherRankFailedError
        return int(self.store.add(name, n_more))

    def _tell_failure(self) -> None:
        if self.store is not None:
            self.store.set("failed", str(self.rank))


@contextlib.contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """The ranks that torchrun has started, joined for the block; one rank without torchrun.

    Objects travel by gloo, tensors on GPUs by NCCL.

    Raises:
        ConfigError: when only some of torchrun's variables are set, or not to numbers.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield Ranks()
        return
    missing = [name for name in _VARIABLES if name not in os.environ]
    numbers = [os.environ.get(name, "") for name in _VARIABLES if name != "MASTER_ADDR"]
    if not missing and not all(number.isdecimal() for number in numbers):
        raise ConfigError(
            "A variable of torchrun is not a number",
            where=", ".join(f"{name}={os.environ[name]}" for name in _VARIABLES),
            fix="Start several processes with torchrun, or unset WORLD_SIZE",
        )
    if missing:
        raise ConfigError(
            "WORLD_SIZE is set and other variables of torchrun are not",
            where=", ".join(missing),
            fix="Start several processes with torchrun, or unset WORLD_SIZE",
        )
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, world_size = next(rendezvous("env://", timeout=_LONGEST_WAIT))
    store.set_timeout(_LONGEST_WAIT)
    backend = "cpu:gloo,cuda:nccl" if dist.is_nccl_available() and _has_gpu() else "gloo"
    dist.init_process_group(
        backend,
        store=PrefixStore("group", store),
        rank=rank,
        world_size=world_size,
        timeout=_LONGEST_WAIT,
    )
    try:
        yield Ranks(
            rank=rank,
            world_size=world_size,
            local_rank=int(os.environ["LOCAL_RANK"]),
            n_local=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            store=PrefixStore("ranks", store),
        )
    finally:
        dist.destroy_process_group()


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _attempt(
    work: Callable[[], T], on_failure: Callable[[], None] = lambda: None
) -> tuple[T | None, VisaeError | None]:
    """What the work gives, or the failure that others are to hear of."""
    try:
        return work(), None
    except VisaeError as failure:
        on_failure()
        return None, failure
