"""What the children of training.py share: the tokens, the clock, the memory and the checks.

Needs torch and nothing else, so that it runs in every toolkit's own environment. A child's script
says which kinds its toolkit has and how one step of each is made; ``serve`` answers requests, JSON
lines, until there are no more.
"""

import ctypes
import dataclasses
import gc
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

RANK = 256  # of the tokens, so that there is something to learn


@dataclasses.dataclass(frozen=True)
class Case:
    """One SAE and one batch."""

    kind: str
    n_features: int
    batch: int
    d_model: int
    k: int
    dead: float
    """Share of the features that AuxK takes for dead, in every step."""
    device: str
    rate: float = 3e-4

    @property
    def n_dead(self) -> int:
        return int(self.dead * self.n_features)

    def tokens(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        mixing = torch.randn(RANK, self.d_model, generator=generator)
        x = torch.randn(self.batch, RANK, generator=generator) @ mixing
        return (x / x.std()).to(self.device)

    def dead_mask(self) -> torch.Tensor:
        return torch.arange(self.n_features, device=self.device) < self.n_dead


class Trial(NamedTuple):
    """A toolkit's SAE on a batch."""

    step: Callable[[], object]
    """One optimisation step: encode, loss, backward, clip, optimiser, and what it counts."""
    look: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    """Active features of each token as the step sees them, and the reconstruction."""


class UnsupportedError(Exception):
    """The toolkit has no such kind."""


def serve(make: Callable[[Case, torch.Tensor], Trial], package: str) -> None:
    """Answer requests; ``make`` raises ``UnsupportedError`` where its toolkit has no such kind."""
    answer = sys.stdout
    sys.stdout = sys.stderr  # what toolkits print
    print(json.dumps({"ready": True}), file=answer, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        torch.set_num_threads(request.pop("threads"))
        limits = request.pop("seconds"), request.pop("warm_up")
        try:
            found = measure(make, Case(**request), *limits)
        except UnsupportedError:
            found = {"unsupported": True}
        found["version"] = importlib.metadata.version(package)
        print(json.dumps(found), file=answer, flush=True)


def measure(make, case: Case, seconds: float, warm_up: int) -> dict[str, object]:
    """Median seconds of a step, its peak memory in MB, and what came of the steps."""
    torch.manual_seed(0)
    x = case.tokens()
    tidy(case.device)
    idle = resident(case.device, "now")
    trial = make(case, x)
    before = figures(trial, x)
    for _ in range(warm_up):
        trial.step()
    tidy(case.device)
    times = timed(trial.step, seconds, case.device)
    peak = resident(case.device, "peak") - idle
    return {
        "seconds": statistics.median(times),
        "n_steps": warm_up + len(times),
        "peak": peak,
        "before": before,
        "after": figures(trial, x),
    }


def timed(step: Callable[[], object], seconds: float, device: str) -> list[float]:
    """Seconds of each step, at least three, until so many have passed."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times


@torch.no_grad()
def figures(trial: Trial, x: torch.Tensor) -> dict[str, float]:
    """L0 (mean, and the largest of a token) and NMSE of the batch."""
    counts, rebuilt = trial.look()
    spread = (x - x.mean(0)).square().sum()
    return {
        "l0": float(counts.double().mean()),
        "largest": float(counts.max()),
        "nmse": float((rebuilt - x).square().sum() / spread),
    }


def tidy(device: str) -> None:
    """Give memory back to the system, and forget its peak."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def resident(device: str, which: str) -> float:
    """Megabytes in use, or at most since ``tidy``."""
    if device == "cuda":
        peak = which == "peak"
        return (torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated)() / 1e6
    status = Path("/proc/self/status").read_text()
    name = {"now": "VmRSS:", "peak": "VmHWM:"}[which]
    return float(status.partition(name)[2].split()[0]) * 1024 / 1e6
