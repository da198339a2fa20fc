"""Every kind of run in one group: trained, interrupted, resumed, saved and loaded."""

import pytest
import torch

from visae.errors import ConfigError
from visae.saes.checkpoint import load_sae, read_sae_record
from visae.saes.config import ArchetypesConfig
from visae.saes.learned import Gated, JumpReLU
from visae.saes.sparsity import TopK
from visae.training.config import RunConfig, TrainConfig
from visae.training.loop import train

SITE = "residual@0"
N_STEPS = 8
OPTIONS = {
    "jumprelu": {"sparsity": JumpReLU(target_l0=3)},
    "gated": {"sparsity": Gated(l1=0.02)},
    "archetypal": {"archetypes": ArchetypesConfig(n_centroids=20)},
    "random-prefixes": {"random_prefixes": 4},
    "orthogonal": {"orthogonality": 0.3},
    "frozen-decoder": {"control": "frozen-decoder"},
    "frozen-encoder": {"control": "frozen-encoder"},
}


def runs():
    made = {name: {"sparsity": TopK(k=3), "n_features": 32} | o for name, o in OPTIONS.items()}
    return [RunConfig(name=name, learning_rate=3e-3, **o) for name, o in made.items()]


def config():
    return TrainConfig(
        n_tokens=N_STEPS * 100, batch_size=100, checkpoint_seconds=0.0, n_dead_tokens=300
    )


@pytest.fixture(scope="module")
def whole(planted, tmp_path_factory):
    out = tmp_path_factory.mktemp("kinds")
    train(planted.store, SITE, runs(), out, config=config())
    return out


def test_an_interrupted_group_of_all_kinds_resumes_bit_for_bit(planted, whole, tmp_path):
    def stop(told):
        if told.done > 300:
            raise KeyboardInterrupt

    settings = TrainConfig(
        n_tokens=N_STEPS * 100,
        batch_size=100,
        checkpoint_seconds=0.0,
        n_dead_tokens=300,
        log_steps=1,
    )
    with pytest.raises(KeyboardInterrupt):
        train(planted.store, SITE, runs(), tmp_path, config=settings, progress=stop)
    train(planted.store, SITE, runs(), tmp_path, config=settings)
    for name in OPTIONS:
        first, second = load_sae(whole / name), load_sae(tmp_path / name)
        for key, tensor in first.state_dict().items():
            assert torch.equal(second.state_dict()[key], tensor), (name, key)


@pytest.mark.parametrize("name", OPTIONS)
def test_each_says_what_it_is(whole, name):
    record = read_sae_record(whole / name)
    control = name if name.startswith("frozen") else "none"
    assert record.provenance.control == control
    assert record.provenance.n_tokens == N_STEPS * 100
    assert record.metrics["nmse"] < 1.0
    assert bool(record.prefixes) == (name != "random-prefixes")
    archetypes = record.provenance.recipe["run"]["archetypes"]
    assert (archetypes is not None) == (name == "archetypal")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"orthogonality": -1.0}, "orthogonality is -1"),
        ({"random_prefixes": 1}, "random_prefixes is 1"),
        ({"random_prefixes": 33}, "random_prefixes is 33"),
        ({"random_prefixes": 4, "matryoshka": False}, "random_prefixes needs matryoshka"),
        ({"archetypes": ArchetypesConfig(), "control": "untrained"}, "control untrained"),
        ({"archetypes": ArchetypesConfig(), "target_site": "mlp@0"}, "transcoder.*archetypes"),
    ],
)
def test_what_cannot_be_joined_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        RunConfig(**{"name": "a", "n_features": 32, **changes})


def test_more_centroids_than_half_of_the_tokens_are_refused(planted, tmp_path):
    run = RunConfig(name="a", n_features=32, archetypes=ArchetypesConfig(n_centroids=1500))
    with pytest.raises(ConfigError, match="1500 centroids cannot be found in 1000 tokens"):
        train(planted.store, SITE, [run], tmp_path, config=config())
    assert not list(tmp_path.rglob("sae.*"))


def test_archetypes_are_found_in_more_than_one_batch():
    run = RunConfig(name="a", n_features=32, archetypes=ArchetypesConfig(n_centroids=20))
    assert run.n_start_tokens == 640
    assert RunConfig(name="a", n_features=32).n_start_tokens == 32
