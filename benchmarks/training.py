"""What one training step costs: each back end of the engine beside the encode product alone.

    .venv/bin/python benchmarks/training.py --threads 2

Steps of TopK and BatchTopK SAEs (k 32) on random low-rank tokens, with and without AuxK at work on
a tenth of the features. Rounds are interleaved, so that whatever else the machine does meets every
row alike; the table holds medians, and each step's share of the product's speed in the same
precision. Prints Markdown for RESULTS.md. Peak memory is that of a fresh process a row.
"""

import argparse
import itertools
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from measuring import machine, middle, table_row

from visae.saes.config import SAEConfig
from visae.saes.engine import SparseEngine
from visae.saes.initialise import initialise
from visae.saes.kernels.choice import choose_kernels, fastest_encode
from visae.saes.losses import batch_loss
from visae.saes.sae import SAE
from visae.saes.sparsity import BatchTopK, TopK

KINDS = {"topk": TopK, "batch-topk": BatchTopK}
K, RANK, DEAD_SHARE = 32, 256, 0.1


class Case(NamedTuple):
    """One row of the table."""

    engine: str
    encode: str
    kind: str
    n_features: int
    batch: int
    dead: float


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    print(machine(), end="\n\n")
    head = ("engine", "encode", "kind", "features", "batch", "dead", "ms", "of product", "peak MB")
    print(table_row(head), table_row(["---"] * len(head)), sep="\n")
    for n_features, batch in itertools.product(options.n_features, options.batch):
        for row in rows(options, n_features, batch):
            print(table_row(row), flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--n-features", type=int, nargs="+", default=[6144, 12288, 24576])
    parser.add_argument("--batch", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--engines", nargs="+", default=["numba", "torch", "reference"])
    parser.add_argument("--encode", nargs="+", default=[None, "float32"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def rows(options: argparse.Namespace, n_features: int, batch: int) -> list[list[str]]:
    """Every engine's row for one size, in interleaved rounds."""
    encodes = dict.fromkeys(each or fastest_encode(torch.device("cpu")) for each in options.encode)
    cases = [
        Case(engine, encode, kind, n_features, batch, dead)
        for engine, encode, kind, dead in itertools.product(
            options.engines, encodes, options.kinds, (0.0, DEAD_SHARE)
        )
        if engine != "reference" or encode == "float32"
    ]
    steps = {case: step_of(case, options) for case in cases}
    products = {encode: product_of(encode, n_features, batch, options) for encode in encodes}
    times = rounds({**steps, **products}, options.rounds)
    return [
        [
            *(case.engine, case.encode, case.kind, f"{n_features:,}", f"{batch:,}"),
            *(f"{case.dead:.0%}", f"{times[case] * 1e3:.1f}"),
            *(f"{times[case.encode] / times[case]:.0%}", f"{peak(case, options):,.0f}"),
        ]
        for case in cases
    ]


def rounds(calls: dict[object, Callable[[], None]], count: int) -> dict[object, float]:
    """Median seconds of each call, one after the other in every round; the first is not counted."""
    seconds: dict[object, list[float]] = {name: [] for name in calls}
    for _ in range(count + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: middle(measured[1:]) for name, measured in seconds.items()}


def product_of(
    encode: str, n_features: int, batch: int, options: argparse.Namespace
) -> Callable[[], None]:
    """The encode's matrix product, in chunks of tokens as the engine takes it."""
    dtype = getattr(torch, encode)
    w = torch.randn(n_features, options.d_model).to(options.device, dtype)
    x = torch.randn(batch, options.d_model).to(options.device, dtype)
    out = torch.empty(min(batch, 2**24 // n_features), n_features, dtype=dtype, device=w.device)

    def product() -> None:
        for chunk in x.split(out.shape[0]):
            torch.mm(chunk, w.T, out=out[: chunk.shape[0]])
        finish(options)

    return product


def step_of(case: Case, options: argparse.Namespace) -> Callable[[], None]:
    """One optimisation step on the same batch, again and again."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(RANK, options.d_model, generator=generator)
    x = torch.randn(case.batch, RANK, generator=generator) @ mixing
    x = (x / x.std()).to(options.device)
    config = SAEConfig(
        d_model=options.d_model, n_features=case.n_features, sparsity=KINDS[case.kind](k=K)
    )
    sae = SAE(config).to(options.device)
    initialise(sae, x, seed=0)
    dead = torch.arange(case.n_features, device=x.device) < case.dead * case.n_features
    sae.b_enc.detach()[dead] = -10  # so that they stay dead
    device = torch.device(options.device)
    if case.engine == "reference":
        return plain_step(sae, x, dead, options)
    kernels = choose_kernels(case.engine, device=device, encode=case.encode)
    engine = SparseEngine(sae, kernels)

    def step() -> None:
        found = engine.gradients(x, dead, auxk_alpha=1 / 32)
        engine.update(found.gradients, rate=1e-5, clip_norm=1.0)
        finish(options)

    return step


def plain_step(
    sae: SAE, x: torch.Tensor, dead: torch.Tensor, options: argparse.Namespace
) -> Callable[[], None]:
    parameters = list(sae.parameters())
    adam = torch.optim.Adam(parameters, lr=1e-5, eps=6.25e-10, fused=True)

    def step() -> None:
        adam.zero_grad()
        batch_loss(sae, x, dead, auxk_alpha=1 / 32).total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        finish(options)

    return step


def finish(options: argparse.Namespace) -> None:
    if options.device == "cuda":
        torch.cuda.synchronize()


def peak(case: Case, options: argparse.Namespace) -> float:
    """Megabytes that two steps take at most, in a process of their own, above its start."""
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step_of(case, options)()
        return torch.cuda.max_memory_allocated() / 1e6
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(child_peak, case, options).result()


def child_peak(case: Case, options: argparse.Namespace) -> float:
    torch.set_num_threads(options.threads)
    before = resident("VmRSS")
    step = step_of(case, options)
    step()  # compiles
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    step()
    return resident("VmHWM") - before


def resident(name: str) -> float:
    """Megabytes of memory that this process holds, or held at most."""
    status = Path("/proc/self/status").read_text()
    return float(status.partition(f"{name}:")[2].split()[0]) / 1e3


if __name__ == "__main__":
    main()
