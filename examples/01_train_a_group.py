"""Train a group of SAEs from one pass over a store, and see how well they reconstruct.

    python examples/01_train_a_group.py work/activations/photos work/saes/group

Every k in three seeds, and an untrained control: all of them see the same batches, so that what
differs between them is their settings. Run it again and it goes on where it was stopped.
"""

import argparse
from pathlib import Path

from rich.console import Console

from visae import (
    ChoiceRule,
    RunSettings,
    ShuffledTokens,
    SweepConfig,
    TrainConfig,
    open_store,
    train_sweep,
)


def main() -> None:
    options = arguments()
    store = open_store(options.store)
    site = options.site or store.sites[0]
    config = TrainConfig(n_tokens=options.n_tokens, batch_size=options.batch_size)
    stream = ShuffledTokens(store, site, tokens=config.tokens, batch_size=config.batch_size)

    sweep = SweepConfig(
        grid={"k": [4, 8, 16], "seed": [0, 1, 2]},
        run=({"name": "untrained", "control": "untrained"},),
        choice=ChoiceRule(largest_l0=8, largest_dead_share=0.05),
    )
    shared = RunSettings(site=site, kind="topk", expansion=options.expansion)
    runs = sweep.runs(shared, lambda settings: stream.d_model(site))

    result = train_sweep(stream, runs, options.out, config=config, rule=sweep.choice)
    Console().print(result.table())
    for choice in result.choices:
        print(f"Chosen at {choice.sites}: {choice.chosen}, by the rule: {result.rule_text}")
    for k in (4, 8, 16):
        errors = [row.nmse for row in result.rows if row.k == k and row.nmse is not None]
        print(f"k = {k}: NMSE {min(errors):.4f} to {max(errors):.4f} over {len(errors)} seeds")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path, help="folder of an activation store")
    parser.add_argument("out", type=Path, help="folder for the SAEs and their table")
    parser.add_argument("--site", help="site to train on; without it, the store's first")
    parser.add_argument("--expansion", type=int, default=8, help="features per dimension")
    parser.add_argument("--n-tokens", type=int, default=2_000_000, help="tokens to train on")
    parser.add_argument("--batch-size", type=int, default=4096, help="tokens in a batch")
    return parser.parse_args()


if __name__ == "__main__":
    main()
