"""What moves the weights: each engine against the reference, alone and taking over from it."""

import itertools
import logging

import pytest
import torch

from visae.activations.loaders import ShuffledTokens
from visae.errors import ConfigError, StoreError
from visae.saes.config import ArchetypesConfig
from visae.saes.learned import JumpReLU
from visae.saes.sae import SAE
from visae.saes.sparsity import BatchTopK, ReLU, TopK
from visae.training.config import RunConfig, TrainConfig
from visae.training.engines import DenseEngine, Engine, KernelEngine, choose_engine
from visae.training.schedules import KSchedule
from visae.training.trainee import Trainee

N_STEPS = 300
ENGINES = ("torch", "numba")
KINDS = {
    "topk": {"sparsity": TopK(k=4)},
    "batch-topk": {"sparsity": BatchTopK(k=4)},
    "random prefixes": {"sparsity": BatchTopK(k=4), "random_prefixes": 4},
}


def config(engine, **changes):
    options = {"n_tokens": N_STEPS * 64, "batch_size": 64, "n_dead_tokens": 300, "engine": engine}
    return TrainConfig(**options | changes)


def trainee_of(planted, engine, options, **changes):
    run = RunConfig(**{"name": "a", "n_features": 64, "learning_rate": 3e-3} | options)
    sae = SAE(run.sae_config(16))
    statistics = planted.store.statistics(planted.site)
    sae.mean.copy_(statistics.mean)
    sae.scale.fill_(statistics.scale)
    return Trainee(sae, run, config(engine, **changes))


@pytest.fixture(scope="module")
def stream(planted):
    loader = ShuffledTokens(planted.store, planted.site, batch_size=64)
    taken = itertools.islice(iter(loader), N_STEPS)
    return [batch.activations[planted.site].float() for batch in taken]


def losses(trainee, stream, first=0):
    return [float(trainee.step(x, number).total) for number, x in enumerate(stream, start=first)]


@pytest.fixture(scope="module")
def reference(planted, stream):
    """The losses of the reference, by kind of SAE."""
    found = {}
    for name, options in KINDS.items():
        trainee = trainee_of(planted, "reference", options)
        trainee.start(stream[0])
        found[name] = losses(trainee, stream)
    return found


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_losses_of_three_hundred_steps_are_those_of_the_reference(
    planted, stream, reference, kind, engine
):
    trainee = trainee_of(planted, engine, KINDS[kind])
    trainee.start(stream[0])
    assert trainee.engine.startswith(engine)
    found = losses(trainee, stream)
    assert found[:20] == pytest.approx(reference[kind][:20], rel=1e-4)
    ends = [sum(each[-20:]) for each in (found, reference[kind])]
    assert ends[0] == pytest.approx(ends[1], rel=1e-3)


def test_the_recipe_of_that_test_revives_features(planted, stream):
    trainee = trainee_of(planted, "torch", KINDS["topk"])
    trainee.start(stream[0])
    auxk = [float(trainee.step(x, number).auxk) for number, x in enumerate(stream[:120])]
    assert max(auxk) > 0


@pytest.mark.parametrize(
    ("before", "after"), [("reference", "numba"), ("numba", "torch"), ("torch", "reference")]
)
def test_an_engine_goes_on_where_another_stopped(planted, stream, reference, before, after):
    first = trainee_of(planted, before, KINDS["topk"])
    first.start(stream[0])
    losses(first, stream[:50])
    state = {name: tensor.clone() for name, tensor in first.state().items()}
    second = trainee_of(planted, after, KINDS["topk"])
    second.restore(state)
    assert sorted(second.state()) == sorted(state)
    found = losses(second, stream[50:100], first=50)
    assert found == pytest.approx(reference["topk"][50:100], rel=1e-3)


@pytest.mark.parametrize("engine", ENGINES)
def test_each_engine_goes_on_bit_for_bit(planted, stream, engine):
    changes = {"average_decay": 0.9, "k_schedule": KSchedule(start=3.0)}
    first, second = (trainee_of(planted, engine, KINDS["batch-topk"], **changes) for _ in range(2))
    first.start(stream[0])
    losses(first, stream[:20])
    second.restore({name: tensor.clone() for name, tensor in first.state().items()})
    assert losses(first, stream[20:40], 20) == losses(second, stream[20:40], 20)
    for name, tensor in first.state().items():
        assert torch.equal(second.state()[name], tensor), name


@pytest.mark.parametrize("engine", ["reference", *ENGINES])
@pytest.mark.parametrize("kind", ["topk", "batch-topk"])
def test_k_follows_its_schedule(planted, stream, engine, kind):
    schedule = KSchedule(start=3.0, decay_share=0.02)
    trainee = trainee_of(planted, engine, KINDS[kind], k_schedule=schedule)
    trainee.start(stream[0])
    found = [trainee.step(x, n).codes.values.numel() / 64 for n, x in enumerate(stream[:9])]
    wanted = [round(4 * schedule.factor(n, N_STEPS)) for n in range(9)]
    assert wanted[0] == 12
    assert wanted[-1] == 4
    assert found == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("engine", ["reference", *ENGINES])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_batch_that_holds_no_numbers_moves_nothing(planted, stream, engine, value):
    trainee = trainee_of(planted, engine, KINDS["batch-topk"])
    trainee.start(stream[0])
    trainee.step(stream[0], 0)
    before = {name: tensor.clone() for name, tensor in trainee.state().items()}
    bad = stream[1].clone()
    bad[3, 2] = value
    with pytest.raises(StoreError, match=r"loss of a is (nan|inf), for this batch holds NaN"):
        trainee.step(bad, 1)
    assert all(torch.equal(before[name], tensor) for name, tensor in trainee.state().items())


@pytest.mark.parametrize("engine", ["reference", *ENGINES])
def test_weights_that_run_away_are_told_from_bad_data(planted, stream, engine):
    trainee = trainee_of(planted, engine, KINDS["topk"] | {"learning_rate": 1e30})
    trainee.start(stream[0])
    with pytest.raises(StoreError, match=r"activations are finite.*Lower the learning rate"):
        losses(trainee, stream[:5])


# The choice


def chosen(engine, options, double=False):
    run = RunConfig(**{"name": "a", "n_features": 64, "sparsity": TopK(k=4)} | options)
    sae = SAE(run.sae_config(16))
    return choose_engine(sae.double() if double else sae, run, config(engine), None)


OTHERS = {
    "sparsity relu": {"sparsity": ReLU()},
    "sparsity jumprelu": {"sparsity": JumpReLU()},
    "control frozen-decoder": {"control": "frozen-decoder"},
    "made of archetypes": {"archetypes": ArchetypesConfig(n_centroids=8)},
    "orthogonal": {"orthogonality": 0.1},
}


@pytest.mark.parametrize("reason", OTHERS)
def test_what_the_sparse_engine_cannot_train_goes_to_the_reference(reason, caplog):
    with caplog.at_level(logging.INFO):
        engine = chosen("auto", OTHERS[reason])
    assert isinstance(engine, DenseEngine)
    assert isinstance(engine, Engine)
    (line,) = caplog.messages
    assert line.startswith("engine reference: a: ")
    assert reason in line


@pytest.mark.parametrize("reason", OTHERS)
def test_a_back_end_asked_for_says_what_it_cannot_train(reason):
    with pytest.raises(ConfigError, match=f"The engine numba cannot train this SAE: a: .*{reason}"):
        chosen("numba", OTHERS[reason])


def test_double_precision_goes_to_the_reference(caplog):
    with caplog.at_level(logging.INFO):
        assert isinstance(chosen("auto", {}, double=True), DenseEngine)
    assert "float64" in caplog.text


def test_the_fastest_engine_is_chosen_and_said(caplog):
    with caplog.at_level(logging.INFO):
        engine = chosen("auto", {})
    assert isinstance(engine, KernelEngine)
    assert isinstance(engine, Engine)
    assert engine.name.startswith("numba, encode in ")
    assert caplog.messages[0].startswith("engine numba: the fastest for cpu")


def test_the_reference_is_there_for_the_asking():
    assert chosen("reference", {}).name == "reference"


def test_a_control_that_never_learns_needs_no_engine(caplog):
    with caplog.at_level(logging.INFO):
        chosen("numba", {"control": "untrained"})
    assert not caplog.messages
