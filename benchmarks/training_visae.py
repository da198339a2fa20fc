"""A child of training.py: visae's own training step.

    python training_visae.py auto|torch|reference|triton [float32]

``float32`` has the encode in that precision where the machine has bfloat16 units too.
"""

import sys

import torch
from training_worker import Case, Trial, UnsupportedError, serve

from visae.saes import learned, sparsity
from visae.saes.kernels import choice
from visae.saes.sae import SAE
from visae.training.config import RunConfig, TrainConfig
from visae.training.trainee import Trainee


def kind(case: Case):
    """The sparsity, with the defaults of penalties."""
    if case.kind == "relu":
        return sparsity.ReLU()
    if case.kind == "jumprelu":
        return learned.JumpReLU()
    return {"topk": sparsity.TopK, "batch-topk": sparsity.BatchTopK}[case.kind](k=case.k)


def make(case: Case, x: torch.Tensor) -> Trial:
    if "topk" not in case.kind and sys.argv[1:] not in (["auto"], ["reference"]):
        raise UnsupportedError  # the reference engine trains those, whatever the encode
    run = RunConfig(
        name="run",
        site="residual@0",
        n_features=case.n_features,
        sparsity=kind(case),
        matryoshka=False,
        learning_rate=case.rate,
    )
    config = TrainConfig(n_tokens=10_000 * case.batch, batch_size=case.batch, engine=ENGINE)
    sae = SAE(run.sae_config(case.d_model)).to(case.device)
    trainee = Trainee(sae, run, config)
    trainee.start(x)
    never = torch.iinfo(torch.int64).max // 2

    def step() -> float:
        trainee.tokens_since_fired[: case.n_dead] = never
        return float(trainee.step(x, 5_000).total)

    def look() -> tuple[torch.Tensor, torch.Tensor]:
        codes = sae.select_batch(sae.pre_activations(sae.normalise(x)))
        return codes.counts, sae.decode_sparse(codes)

    return Trial(step, look)


if __name__ == "__main__":
    ENGINE = sys.argv[1]
    if "float32" in sys.argv:
        choice.fastest_encode = lambda device: "float32"
    serve(make, "visae")
