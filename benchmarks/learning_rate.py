"""The peak learning rate of a short run: NMSE and dead features at the end, rate by rate.

    .venv/bin/python benchmarks/learning_rate.py --store WORKSPACE/activations/cifar10

Trains all rates as one group over one stream, so that nothing but the rate differs, and prints a
Markdown table for RESULTS.md. The store is the demo's (``make demo``).
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from visae.activations.store import ActivationStore
from visae.saes.sparsity import BatchTopK
from visae.training.config import RunConfig, TrainConfig
from visae.training.loop import train
from visae.training.metrics import read_metrics

RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--site", default="residual@9")
    parser.add_argument("--n-features", type=int, default=3072)
    parser.add_argument("--n-tokens", type=int, default=1_000_000)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    config = TrainConfig(n_tokens=options.n_tokens)
    default = run("default", None, options.n_features, 0).peak_learning_rate(config.n_steps)
    print(f"{config.n_steps} steps, {options.n_features} features; the default is {default:.2g}\n")
    print("| peak rate | NMSE | dead features |\n|---|---|---|")
    for rate in RATES:
        nmse, dead = outcome(rate, options, config)
        print(f"| {rate:g} | {nmse:.4f} | {dead / options.n_features:.1%} |")


def outcome(rate: float, options: argparse.Namespace, config: TrainConfig) -> tuple[float, float]:
    """Median over seeds of the last line's NMSE and dead features."""
    store = ActivationStore(options.store)
    runs = [run(f"seed{seed}", rate, options.n_features, seed) for seed in range(options.seeds)]
    with tempfile.TemporaryDirectory() as folder:
        train(store, options.site, runs, Path(folder), config=config)
        last = [read_metrics(Path(folder) / each.name)[-1] for each in runs]
    nmse = statistics.median(line["nmse"] for line in last)
    return nmse, statistics.median(line["dead"] for line in last)


def run(name: str, rate: float | None, n_features: int, seed: int) -> RunConfig:
    return RunConfig(
        name=name,
        n_features=n_features,
        sparsity=BatchTopK(k=32),
        seed=seed,
        learning_rate=rate,
    )


if __name__ == "__main__":
    main()
