import pytest
import torch

from visae.saes.config import SAEConfig
from visae.saes.learned import JumpReLU
from visae.saes.sae import SAE
from visae.training.average import WeightAverage


def sae_of(seed):
    """An SAE of random weights and unit decoder rows."""
    sae, generator = SAE(SAEConfig(d_model=4, n_features=8, sparsity=JumpReLU())), torch.Generator()
    generator.manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator))
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
        sae.mean.fill_(3.0)
    return sae


def naive(saes, decay):
    """The mean of every parameter, written out in float64."""
    means = None
    for n, sae in enumerate(saes, start=1):
        share = 1 / min(1 / (1 - decay), max(1.0, n / 10))
        now = {name: p.detach().double() for name, p in sae.named_parameters()}
        means = now if means is None else {k: m + share * (now[k] - m) for k, m in means.items()}
    means["W_dec"] /= means["W_dec"].norm(dim=1, keepdim=True)
    return means


@pytest.mark.parametrize("decay", [0.5, 0.75, 0.999])
def test_it_is_the_exponential_mean_of_every_parameter(decay):
    saes = [sae_of(seed) for seed in range(60)]
    average = WeightAverage(saes[0], decay)
    for sae in saes:
        average.observe(sae)
    result = average.averaged(saes[-1])
    assert torch.equal(result.mean, saes[-1].mean)
    wanted = naive(saes, decay)
    assert set(wanted) == {"W_enc", "b_enc", "W_dec", "b_dec", "learned.threshold"}
    for name, parameter in result.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), wanted[name], rtol=1e-5, atol=1e-6)


def test_the_trained_weights_stay_as_they_are():
    sae, other = sae_of(0), sae_of(1)
    average = WeightAverage(sae, 0.9)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    for _ in range(20):
        average.observe(sae)
    average.observe(other)
    assert not torch.equal(average.averaged(other).W_enc, other.W_enc)
    assert all(torch.equal(other.state_dict()[name], t) for name, t in before.items())


def test_before_any_step_it_is_the_sae():
    sae = sae_of(0)
    assert WeightAverage(sae_of(1), 0.9).averaged(sae) is sae


def test_a_restored_mean_goes_on_bit_for_bit():
    first, second = WeightAverage(sae_of(0), 0.9), WeightAverage(sae_of(5), 0.9)
    for seed in range(15):
        first.observe(sae_of(seed))
    second.restore({name: tensor.clone() for name, tensor in first.state().items()})
    for average in (first, second):
        average.observe(sae_of(20))
    results = [average.averaged(sae_of(20)).state_dict() for average in (first, second)]
    assert all(torch.equal(results[1][name], tensor) for name, tensor in results[0].items())
