"""The sparse engine against dense autograd and ``torch.optim.Adam``, step by step."""

import pytest
import torch

from visae.errors import ConfigError
from visae.saes.config import SAEConfig
from visae.saes.engine import SparseEngine
from visae.saes.kernels.compiled import NumbaKernels
from visae.saes.kernels.plain import TorchKernels
from visae.saes.losses import batch_loss
from visae.saes.sae import SAE
from visae.saes.sparsity import BatchTopK, ReLU, TopK

D_MODEL, N_FEATURES, N_TOKENS, RATE = 24, 200, 50, 1e-3
KINDS = {
    "topk": {"sparsity": TopK(k=5)},
    "batch-topk": {"sparsity": BatchTopK(k=5)},
    "matryoshka": {"sparsity": BatchTopK(k=5), "prefixes": (20, 90, N_FEATURES)},
    "transcoder": {"sparsity": TopK(k=5), "transcoder": True},
}


@pytest.fixture(params=[NumbaKernels, TorchKernels], ids=["numba", "torch"])
def back_end(request):
    return request.param


def sae_of(kind="topk", **changes):
    config = {"d_model": D_MODEL, "n_features": N_FEATURES, **KINDS[kind], **changes}
    sae, generator = SAE(SAEConfig(**config)), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
        sae.mean.normal_(generator=generator)
        sae.scale.fill_(1.7)
    return sae


def batch(sae, step):
    generator = torch.Generator().manual_seed(step)
    x = 2 * torch.randn(N_TOKENS, D_MODEL, generator=generator)
    return {"x": x, "target": x.roll(1, 1) if sae.config.transcoder else None}


class Plain:
    """What the engine must equal."""

    def __init__(self, sae):
        self.sae = sae
        self.parameters = [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec]
        self.adam = torch.optim.Adam(self.parameters, lr=RATE, eps=6.25e-10, fused=True)

    def step(self, dead, number, clip_norm=1.0):
        loss = batch_loss(self.sae, dead=dead, auxk_alpha=1 / 32, **batch(self.sae, number))
        self.adam.zero_grad()
        torch.autograd.backward(loss.total)
        rows, gradient = self.sae.W_dec.detach(), self.sae.W_dec.grad
        gradient -= (gradient * rows).sum(1, keepdim=True) * rows
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, clip_norm)
        self.adam.step()
        with torch.no_grad():
            self.sae.W_dec.div_(self.sae.W_dec.norm(dim=1, keepdim=True))
        return loss, norm


def step(engine, sae, dead, number, clip_norm=1.0):
    found = engine.gradients(dead=dead, auxk_alpha=1 / 32, **batch(sae, number))
    engine.update(found.gradients, rate=RATE, clip_norm=clip_norm)
    return found


@pytest.mark.parametrize("with_dead", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_the_reference(back_end, kind, with_dead):
    dead = torch.zeros(N_FEATURES, dtype=torch.bool)
    dead[:: 7 if with_dead else N_FEATURES + 1] = True
    dead[0] = with_dead
    plain, sae = Plain(sae_of(kind)), sae_of(kind)
    engine = SparseEngine(sae, back_end(encode="float32"))
    for number in range(6):
        wanted, norm = plain.step(dead, number)
        found = step(engine, sae, dead, number)
        torch.testing.assert_close(found.loss.total, wanted.total.detach())
        torch.testing.assert_close(found.loss.auxk, wanted.auxk)
        torch.testing.assert_close(found.loss.reconstruction, wanted.reconstruction)
        torch.testing.assert_close(found.gradients.norm, norm, rtol=1e-4, atol=0)
        torch.testing.assert_close(found.loss.codes.dense(), wanted.codes.dense())
    for mine, other in zip(sae.parameters(), plain.sae.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_a_bfloat16_encode_leaves_the_loss_that_of_float32(back_end):
    dead = torch.zeros(N_FEATURES, dtype=torch.bool)
    losses = []
    for encode in ("float32", "bfloat16"):
        sae = sae_of("batch-topk")
        engine = SparseEngine(sae, back_end(encode=encode))
        losses.append([float(step(engine, sae, dead, n).loss.total) for n in range(20)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_auxk_in_bfloat16_is_that_of_float32_to_its_rounding(back_end):
    dead = torch.arange(N_FEATURES) % 3 == 0
    sae = sae_of()
    found = [
        SparseEngine(sae, back_end(encode=encode)).gradients(
            dead=dead, auxk_alpha=1 / 32, **batch(sae, 0)
        )
        for encode in ("float32", "bfloat16")
    ]
    torch.testing.assert_close(found[0].loss.auxk, found[1].loss.auxk, rtol=1e-2, atol=0)
    touched = found[0].gradients.touched
    for one, other in zip(*(f.gradients.weights[:3] for f in found), strict=True):
        assert (one - other)[touched].norm() < 0.02 * one[touched].norm()


def test_auxk_reaches_dead_rows_and_nothing_else(back_end):
    dead = torch.zeros(N_FEATURES, dtype=torch.bool)
    dead[[3, 77]] = True
    sae = sae_of()
    sae.b_enc.detach()[dead] = -100  # dead features never fire among the others
    engine = SparseEngine(sae, back_end(encode="float32"))
    without = engine.gradients(dead=dead, auxk_alpha=0.0, **batch(sae, 0)).gradients
    without = [t.clone() for t in without.weights], without.touched.clone()
    sae.b_enc.detach()[dead] = 0  # now ReLU(p) is above zero for them
    again = engine.gradients(dead=dead, auxk_alpha=1.0, **batch(sae, 0)).gradients
    assert not without[1][dead].any()
    assert again.touched[dead].all()
    assert again.weights.w_enc[dead].abs().sum() > 0


def test_all_tokens_alike_leave_auxk_at_zero(back_end):
    sae = sae_of()
    dead = torch.ones(N_FEATURES, dtype=torch.bool)
    x = torch.ones(5, D_MODEL)
    found = SparseEngine(sae, back_end(encode="float32")).gradients(x, dead, auxk_alpha=1.0)
    assert float(found.loss.auxk) == 0
    assert torch.isfinite(found.gradients.norm)


def test_state_passes_between_the_engine_and_the_plain_optimiser(back_end):
    dead = torch.zeros(N_FEATURES, dtype=torch.bool)
    plain, sae = Plain(sae_of()), sae_of()
    engine = SparseEngine(sae, back_end(encode="float32"))
    assert engine.state() == {}
    for number in range(3):
        plain.step(dead, number)
        step(engine, sae, dead, number)
    other = sae_of()
    other.load_state_dict(plain.sae.state_dict())
    resumed = SparseEngine(other, back_end(encode="float32"))
    states = [plain.adam.state[parameter] for parameter in plain.parameters]
    resumed.restore({f"{i}.{name}": t for i, kept in enumerate(states) for name, t in kept.items()})
    for number in range(3, 6):
        step(engine, sae, dead, number)
        step(resumed, other, dead, number)
    for mine, wanted in zip(other.parameters(), sae.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-6)
    assert set(engine.state()) == set(resumed.state())


def test_a_resumed_engine_continues_bit_for_bit(back_end):
    dead = torch.zeros(N_FEATURES, dtype=torch.bool)
    whole, halved = sae_of(), sae_of()
    engine = SparseEngine(whole, back_end(encode="bfloat16"))
    first = SparseEngine(halved, back_end(encode="bfloat16"))
    for number in range(2):
        step(engine, whole, dead, number)
        step(first, halved, dead, number)
    kept = {name: tensor.clone() for name, tensor in first.state().items()}
    second = SparseEngine(halved, back_end(encode="bfloat16"))
    second.restore(kept)
    for number in range(2, 4):
        step(engine, whole, dead, number)
        step(second, halved, dead, number)
    assert all(map(torch.equal, whole.parameters(), halved.parameters()))


def test_not_a_number_in_the_data_shows_in_the_loss_and_moves_nothing(back_end):
    sae = sae_of()
    before = [parameter.detach().clone() for parameter in sae.parameters()]
    x = batch(sae, 0)["x"]
    x[7, 3] = torch.nan
    dead = torch.zeros(N_FEATURES, dtype=torch.bool)
    found = SparseEngine(sae, back_end(encode="bfloat16")).gradients(x, dead, auxk_alpha=0.1)
    assert torch.isnan(found.loss.total)
    assert all(map(torch.equal, before, sae.parameters()))


def test_kinds_without_a_fixed_number_are_refused(back_end):
    with pytest.raises(ConfigError, match="does not train sparsity relu"):
        SparseEngine(sae_of(sparsity=ReLU()), back_end(encode="float32"))
