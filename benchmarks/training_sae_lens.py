"""A child of training.py: ``SAETrainer.step`` of SAELens."""

import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from training_worker import Case, Trial, UnsupportedError, serve

KINDS = {
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
    "batch-topk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    "relu": (StandardTrainingSAE, StandardTrainingSAEConfig),
    "jumprelu": (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig),
}


def make(case: Case, x: torch.Tensor) -> Trial:
    if case.kind not in KINDS:
        raise UnsupportedError
    module, config = KINDS[case.kind]
    sparse = {"k": case.k} if "topk" in case.kind else {}
    sae = module(config(d_in=case.d_model, d_sae=case.n_features, device=case.device, **sparse))
    settings = SAETrainerConfig(
        total_training_samples=10_000 * case.batch,
        train_batch_size_samples=case.batch,
        lr=case.rate,
        lr_end=case.rate,
        device=case.device,
    )
    trainer = SAETrainer(settings, sae, data_provider=iter(()))

    def step() -> float:
        trainer.n_forward_passes_since_fired[: case.n_dead] = settings.dead_feature_window + 1
        trainer.maybe_reset_sparsity()
        loss = trainer.step(x).loss
        trainer.n_training_steps += 1
        return float(loss)

    def look() -> tuple[torch.Tensor, torch.Tensor]:
        codes, _ = sae.encode_with_hidden_pre(x)
        return (codes != 0).sum(1), sae.decode(codes)

    return Trial(step, look)


if __name__ == "__main__":
    serve(make, "sae-lens")
