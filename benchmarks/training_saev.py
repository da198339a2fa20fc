"""A child of training.py: the step of saev 0.1.0, as in its ``training.train``. ReLU only."""

import torch
from saev.config import SparseAutoencoder as Config
from saev.nn import SparseAutoencoder
from training_worker import Case, Trial, UnsupportedError, serve


def make(case: Case, x: torch.Tensor) -> Trial:
    if case.kind != "relu" or case.dead:
        raise UnsupportedError
    factor, rest = divmod(case.n_features, case.d_model)
    if rest:
        raise UnsupportedError
    sae = SparseAutoencoder(Config(d_vit=case.d_model, exp_factor=factor)).to(case.device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=case.rate, fused=True)

    def step() -> float:
        sae.normalize_w_dec()
        _, _, losses = sae(x)
        losses.loss.backward()
        sae.remove_parallel_grads()
        optimizer.step()
        optimizer.zero_grad()
        return float(losses.loss)

    def look() -> tuple[torch.Tensor, torch.Tensor]:
        sae.normalize_w_dec()
        rebuilt, codes, _ = sae(x)
        return (codes > 0).sum(1), rebuilt

    return Trial(step, look)


if __name__ == "__main__":
    serve(make, "saev")
