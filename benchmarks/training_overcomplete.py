"""A child of training.py: ``train_sae`` of overcomplete, on a list of one batch.

It knows no dead features: its auxiliary loss takes half of all features that a token did not use,
and stands for AuxK here.
"""

import torch
from overcomplete.sae import SAE, BatchTopKSAE, JumpSAE, TopKSAE
from overcomplete.sae.losses import mse_l1, top_k_auxiliary_loss
from overcomplete.sae.train import train_sae
from training_worker import Case, Trial, UnsupportedError, serve


def mse(x, x_hat, *_):
    return (x - x_hat).square().mean()


def make(case: Case, x: torch.Tensor) -> Trial:
    model = make_model(case)
    criterion = {"relu": mse_l1}.get(case.kind, mse)
    if case.dead:
        criterion = top_k_auxiliary_loss
    optimizer = torch.optim.Adam(model.parameters(), lr=case.rate)
    model.train()

    def step() -> None:
        train_sae(model, [x], criterion, optimizer, nb_epochs=1, monitoring=0, device=case.device)

    def look() -> tuple[torch.Tensor, torch.Tensor]:
        _, codes, rebuilt = model(x)
        return (codes != 0).sum(1), rebuilt

    return Trial(step, look)


def make_model(case: Case) -> SAE:
    shape = case.d_model, case.n_features
    if case.dead and "topk" not in case.kind:
        raise UnsupportedError
    if case.kind == "topk":
        return TopKSAE(*shape, top_k=case.k, device=case.device)
    if case.kind == "batch-topk":
        return BatchTopKSAE(*shape, top_k=case.k * case.batch, device=case.device)
    if case.kind == "relu":
        return SAE(*shape, device=case.device)
    if case.kind == "jumprelu":
        return JumpSAE(*shape, device=case.device)
    raise UnsupportedError


if __name__ == "__main__":
    serve(make, "overcomplete")
