"""Which SAEs of a sweep are trained side by side: as many as memory holds.

Between ``training.sweep`` and the loop: an estimate of the bytes that an SAE needs, the memory
that is there, and the division into groups.
"""

import logging
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path

import torch

from visae.errors import ConfigError
from visae.saes.learned import LearnedSparsity
from visae.saes.sparsity import BatchTopK, TopK
from visae.training.config import RunConfig, TrainConfig

__all__ = ["free_memory", "split_by_memory", "state_bytes", "workspace_bytes"]

_BYTES_A_PARAMETER = 24
_USABLE = 0.85
_log = logging.getLogger(__name__)


def state_bytes(run: RunConfig, d_model: int, config: TrainConfig) -> int:
    """Bytes that an SAE holds from its first step to its last, about.

    Weights, Adam's two means and gradients are 16 bytes a parameter; what the allocator keeps
    besides brings it to 24, measured at d_model 768.
    """
    averaged = 0 if config.average_decay is None else 4
    held = _BYTES_A_PARAMETER + averaged if run.learns else 4
    return held * _n_parameters(run, d_model)


def workspace_bytes(run: RunConfig, d_model: int, config: TrainConfig) -> int:
    """Bytes that one step of an SAE needs besides, about; the SAEs of a group take turns.

    Measured: the sparse engine keeps some 12 bytes a token and feature, dense autograd up to 44;
    either has some copies of the weights' gradients.
    """
    if not run.learns:
        return 0
    sparse = _fits_sparse_engine(run, config)
    an_entry, a_parameter = (12, 8) if sparse else (44, 12)
    n_entries = config.batch_size * run.n_features
    return an_entry * n_entries + a_parameter * _n_parameters(run, d_model)


def split_by_memory(
    runs: Sequence[RunConfig],
    d_model: Callable[[RunConfig], int],
    *,
    config: TrainConfig,
    n_bytes: int,
    key: Callable[[RunConfig], Hashable],
) -> list[list[RunConfig]]:
    """The runs in groups that each fit into ``n_bytes``, by the estimates; says so in the log.

    Runs of one group have one ``key``. The order of the runs is kept within every key.

    Raises:
        ConfigError: when one SAE alone does not fit.
    """
    by_key: dict[Hashable, list[RunConfig]] = {}
    for run in runs:
        by_key.setdefault(key(run), []).append(run)
    groups = [
        group
        for members in by_key.values()
        for group in _filled(members, d_model, config=config, n_bytes=n_bytes)
    ]
    _log.info(
        "%d SAEs in %d group%s of %s, by an estimate of their memory and %s",
        len(runs),
        len(groups),
        "" if len(groups) == 1 else "s",
        ", ".join(str(len(group)) for group in groups),
        _shown(n_bytes),
    )
    return groups


def free_memory(device: torch.device) -> int:
    """Bytes that this process may take on a device: 85 % of what is free there.

    Of main memory, what the system and the limits of this process's control group leave.

    Raises:
        ConfigError: when the system does not tell.
    """
    if device.type == "cuda":
        return int(_USABLE * torch.cuda.mem_get_info(device)[0])
    free = [*_system_memory(), *_control_group_memory()]
    if not free:
        raise ConfigError(
            "This system does not say how much memory is free",
            where="memory",
            fix="Say how much the SAEs may take, with --memory-gb or memory_bytes",
        )
    return int(_USABLE * min(free))


def _filled(
    runs: Sequence[RunConfig],
    d_model: Callable[[RunConfig], int],
    *,
    config: TrainConfig,
    n_bytes: int,
) -> list[list[RunConfig]]:
    groups: list[list[RunConfig]] = []
    held = peak = 0
    for run in runs:
        own = state_bytes(run, d_model(run), config)
        step = workspace_bytes(run, d_model(run), config)
        if own + step > n_bytes:
            raise ConfigError(
                f"{run.name} needs some {_shown(own + step)}, and there are {_shown(n_bytes)}",
                where=run.name,
                fix="Give it fewer features, train on smaller batches, or allow more memory with "
                "--memory-gb if you know better",
            )
        if not groups or held + own + max(peak, step) > n_bytes:
            groups.append([])
            held = peak = 0
        groups[-1].append(run)
        held, peak = held + own, max(peak, step)
    return groups


def _n_parameters(run: RunConfig, d_model: int) -> int:
    n, d = run.n_features, d_model
    weights = 2 * n * d + n + d
    if isinstance(run.sparsity, LearnedSparsity):
        weights += n * len(run.sparsity.vectors)
    if run.archetypes is not None:
        weights += n * run.archetypes.n_centroids + n * d + d * run.archetypes.n_centroids
    return weights


def _fits_sparse_engine(run: RunConfig, config: TrainConfig) -> bool:
    sparse_kind = isinstance(run.sparsity, TopK | BatchTopK)
    free = run.control == "none" and run.archetypes is None and not run.orthogonality
    return config.engine != "reference" and sparse_kind and free


def _system_memory() -> Iterable[int]:
    path = Path("/proc/meminfo")
    if not path.is_file():
        return []
    lines = path.read_text(encoding="ascii").splitlines()
    return [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]


def _control_group_memory(folder: Path = Path("/sys/fs/cgroup")) -> Iterable[int]:
    """What a container's limit leaves, its file caches counted as free."""
    limit, used, stat = (folder / f"memory.{name}" for name in ("max", "current", "stat"))
    if not (limit.is_file() and used.is_file() and stat.is_file()):
        return []
    text = limit.read_text(encoding="ascii").strip()
    if text == "max":
        return []
    figures = dict(line.split() for line in stat.read_text(encoding="ascii").splitlines())
    cached = int(figures.get("inactive_file", 0))
    return [int(text) - int(used.read_text(encoding="ascii")) + cached]


def _shown(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2g} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.2g} MB"
