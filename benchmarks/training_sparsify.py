"""A child of training.py: the step of sparsify (eai-sparsify), as in its ``Trainer.fit``.

Its trainer takes the activations from a language model by a hook, so what that does with one batch
stands here line by line: unit decoder, forward with the dead features, loss, backward, gradient
without its part along the decoder, optimiser, count of what fired. It never clips. TopK only.

python training_sparsify.py adam|signum
"""

import contextlib
import os
import sys

import torch
from schedulefree import ScheduleFreeWrapper
from training_worker import Case, Trial, UnsupportedError, serve

if not torch.cuda.is_available():
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its Triton decoder is for GPUs
with contextlib.redirect_stdout(sys.stderr):  # it prints which decoder it took
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.sign_sgd import SignSGD

AUXK_ALPHA = 1 / 32


def make(case: Case, x: torch.Tensor) -> Trial:
    if case.kind != "topk":
        raise UnsupportedError
    config = SparseCoderConfig(num_latents=case.n_features, k=case.k)
    sae = SparseCoder(case.d_model, config, case.device, dtype=torch.float32)
    sae.b_dec.data = x.mean(0)
    optimizer = chosen_optimizer(sae, case)
    counts = torch.zeros(case.n_features, dtype=torch.long, device=case.device)
    did_fire = torch.zeros(case.n_features, dtype=torch.bool, device=case.device)
    dead = case.dead_mask() if case.dead else None

    def step() -> float:
        sae.set_decoder_norm_to_unit_norm()
        variance = (x - x.mean(0)).pow(2).sum()
        out = sae(x=x, y=x, dead_mask=dead, total_variance=variance)
        did_fire[out.latent_indices.flatten()] = True
        (out.fvu + AUXK_ALPHA * out.auxk_loss).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            counts.add_(case.batch)
            counts[did_fire] = 0
            did_fire.zero_()
        return float(out.fvu)

    def look() -> tuple[torch.Tensor, torch.Tensor]:
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x)
        return (out.latent_acts > 0).sum(1), out.sae_out

    return Trial(step, look)


def chosen_optimizer(sae: SparseCoder, case: Case):
    if "signum" not in sys.argv:
        return torch.optim.Adam(sae.parameters(), lr=case.rate)
    rate = 5e-3 / (case.n_features / 2**14) ** 0.5
    optimizer = ScheduleFreeWrapper(SignSGD(sae.parameters(), lr=rate), momentum=0.95)
    optimizer.train()
    return optimizer


if __name__ == "__main__":
    serve(make, "eai-sparsify")
