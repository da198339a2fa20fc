"""A child of training.py: ``update`` of dictionary_learning's trainers."""

import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.standard import StandardTrainer
from dictionary_learning.trainers.top_k import TopKTrainer
from training_worker import Case, Trial, UnsupportedError, serve

KINDS = {
    "topk": TopKTrainer,
    "batch-topk": BatchTopKTrainer,
    "relu": StandardTrainer,
    "jumprelu": JumpReluTrainer,
}


def make(case: Case, x: torch.Tensor) -> Trial:
    if case.kind not in KINDS:
        raise UnsupportedError
    sparse = {"k": case.k} if "topk" in case.kind else {"sparsity_warmup_steps": None}
    trainer = KINDS[case.kind](
        steps=10_000,
        activation_dim=case.d_model,
        dict_size=case.n_features,
        layer=0,
        lm_name="none",
        device=case.device,
        lr=case.rate,
        warmup_steps=0,
        **sparse,
    )
    if case.n_dead and not sparse.get("k"):
        raise UnsupportedError
    number = iter(range(1, 10_000))  # step 0 would also find a geometric median

    def step() -> float:
        if case.n_dead:
            trainer.num_tokens_since_fired[: case.n_dead] = trainer.dead_feature_threshold
        return trainer.update(next(number), x)

    def look() -> tuple[torch.Tensor, torch.Tensor]:
        batch = {"use_threshold": False} if case.kind == "batch-topk" else {}
        codes = trainer.ae.encode(x, **batch)
        return (codes != 0).sum(1), trainer.ae.decode(codes)

    return Trial(step, look)


if __name__ == "__main__":
    serve(make, "dictionary-learning")
