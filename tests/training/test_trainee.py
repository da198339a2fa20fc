import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch

from visae.activations.loaders import ShuffledTokens
from visae.errors import StoreError
from visae.models.config import ModelIdentity
from visae.models.layout import Layout
from visae.saes.checkpoint import Provenance, load_sae, save_sae
from visae.saes.config import ArchetypesConfig
from visae.saes.learned import Gated, JumpReLU
from visae.saes.losses import batch_loss
from visae.saes.orthogonality import orthogonality_loss
from visae.saes.sae import SAE
from visae.saes.sparsity import BatchTopK, ReLU, TopK
from visae.training.config import RunConfig, TrainConfig
from visae.training.trainee import Trainee

CURVE = Path(__file__).with_name("loss_curve.json")
KINDS = {"relu": ReLU(l1=0.02), "topk": TopK(k=4), "batch-topk": BatchTopK(k=4)}
LEARNED = {"jumprelu": JumpReLU(target_l0=4, bandwidth=0.1), "gated": Gated(l1=0.02)}
ALL_KINDS = KINDS | LEARNED
CONFIG = TrainConfig(n_tokens=30 * 100, batch_size=100, n_dead_tokens=400)


def make_trainee(planted, sparsity, *, double=False, config=CONFIG, **changes):
    options = {"name": "a", "n_features": 64, "sparsity": sparsity, "learning_rate": 3e-3}
    run = RunConfig(**options | changes)
    sae = SAE(run.sae_config(16))
    if double:
        sae.double()
    statistics = planted.store.statistics(planted.site)
    sae.mean.copy_(statistics.mean)
    sae.scale.fill_(statistics.scale)
    return Trainee(sae, run, config)


def batches(planted, n, config=CONFIG):
    loader = ShuffledTokens(planted.store, planted.site, batch_size=config.batch_size)
    return [batch.activations[planted.site] for batch in itertools.islice(iter(loader), n)]


def stepped(trainee, x, number, target=None):
    """Make a step, and say what it has shown."""
    loss = trainee.step(x, number, target)
    return trainee.figures(loss, x if target is None else target)


def trained(planted, sparsity, n_steps, **options):
    trainee = make_trainee(planted, sparsity, **options)
    stream = batches(planted, n_steps)
    trainee.start(stream[0])
    return trainee, [stepped(trainee, x, number) for number, x in enumerate(stream)]


# The recorded loss curve: a refactoring must not change what is learned


def curve(planted, kind):
    """Losses of 30 steps in float64, so that every machine gets the same."""
    figures = trained(planted, KINDS[kind], 30, double=True, learning_rate=1e-2)[1]
    return {
        "loss": [f.loss for f in figures],
        "nmse": [f.nmse for f in figures],
        "auxk": [f.auxk for f in figures],
    }


@pytest.fixture(scope="module")
def recorded(planted):
    """The recorded curves. Delete the file to record a meant change, look at it and commit it."""
    if not CURVE.is_file():
        curves = {kind: curve(planted, kind) for kind in KINDS}
        CURVE.write_text(json.dumps(curves, indent=1) + "\n")
        pytest.fail("The loss curves were recorded anew")
    return json.loads(CURVE.read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_curve_is_the_recorded_one(planted, recorded, kind):
    found = curve(planted, kind)
    for name, values in recorded[kind].items():
        assert found[name] == pytest.approx(values, rel=1e-5)


def test_the_recorded_curves_show_learning_and_revival(recorded):
    for kind in ("topk", "batch-topk"):
        nmse = recorded[kind]["nmse"]  # the rows begin as tokens of the first batch
        assert sum(nmse[-5:]) < 0.8 * sum(nmse[1:6])
        assert max(recorded[kind]["auxk"]) > 0


# One step


@pytest.mark.parametrize("sparsity", ALL_KINDS.values(), ids=ALL_KINDS)
def test_decoder_rows_stay_unit(planted, sparsity):
    trainee, _ = trained(planted, sparsity, 12)
    torch.testing.assert_close(trainee.sae.W_dec.norm(dim=1), torch.ones(64))


def test_a_step_is_adam_on_the_projected_and_clipped_gradient(planted):
    """Written out for the first step, where Adam's moments are the gradient's own."""
    trainee = make_trainee(planted, TopK(k=4), double=True)
    x, _ = batches(planted, 2)
    trainee.start(x)
    sae = trainee.sae
    loss = batch_loss(sae, x, torch.zeros(64, dtype=torch.bool), auxk_alpha=1 / 32)
    torch.autograd.backward(loss.total)
    grads = {name: p.grad.clone() for name, p in sae.named_parameters()}
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    rows = before["W_dec"]
    grads["W_dec"] -= (grads["W_dec"] * rows).sum(1, keepdim=True) * rows
    norm = torch.cat([g.flatten() for g in grads.values()]).norm()
    factor = min(1.0, CONFIG.clip_norm / float(norm))
    rate = 3e-3 * CONFIG.rate_schedule.factor(0, 30)
    trainee.step(x, 0)
    for name, parameter in sae.named_parameters():
        g = grads[name] * factor
        expected = before[name] - rate * g / (g.abs() + 6.25e-10)
        if name == "W_dec":
            expected /= expected.norm(dim=1, keepdim=True)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=1e-9)


def test_the_gradient_is_clipped(planted):
    config = TrainConfig(n_tokens=3000, batch_size=100, clip_norm=1e-3, engine="reference")
    trainee = make_trainee(planted, TopK(k=4), config=config)
    (x,) = batches(planted, 1)
    trainee.start(x)
    trainee.step(x, 0)
    grads = torch.cat([p.grad.flatten() for p in trainee.sae.parameters()])
    assert float(grads.norm()) == pytest.approx(1e-3, rel=1e-3)


def test_figures_are_those_of_the_batch_before_the_step(planted):
    trainee = make_trainee(planted, BatchTopK(k=4))
    (x,) = batches(planted, 1)
    trainee.start(x)
    sae = trainee.sae
    codes = sae.config.sparsity.select(sae.pre_activations(sae.normalise(x)).detach())
    rebuilt = sae.decode_sparse(codes)
    nmse = (rebuilt - x).square().sum() / (x - x.mean(0)).square().sum()
    shown = stepped(trainee, x, 0)
    assert shown.nmse == pytest.approx(float(nmse), rel=1e-5)
    assert shown.l0 == codes.values.numel() / 100


def test_features_that_do_not_fire_are_counted(planted):
    trainee = make_trainee(planted, TopK(k=4))
    stream = batches(planted, 8)
    trainee.start(stream[0])
    with torch.no_grad():
        trainee.sae.b_enc[5] = -1e4
    since = torch.zeros(64, dtype=torch.int64)
    for number, x in enumerate(stream):
        sae = trainee.sae
        pre = sae.pre_activations(sae.normalise(x)).detach()
        fired = sae.config.sparsity.select(pre).features.unique()
        trainee.step(x, number)
        since += 100
        since[fired] = 0
        assert torch.equal(trainee.tokens_since_fired, since)
        assert torch.equal(trainee.dead, since > 400)
    assert trainee.dead[5]


def test_the_threshold_starts_from_the_first_measurement(planted):
    """saev's started from 0: after one step it kept 104 features instead of 2."""
    trainee = make_trainee(planted, BatchTopK(k=2))
    (x,) = batches(planted, 1)
    trainee.start(x)
    sae = trainee.sae
    pre = sae.pre_activations(sae.normalise(x)).detach().flatten()
    assert float(sae.threshold) == float(pre.topk(200).values.min())
    assert sae.encode_sparse(x).values.numel() == 199  # all but the smallest itself
    trainee.step(x, 0)
    assert sae.encode_sparse(x).values.numel() / 100 == pytest.approx(2, rel=0.5)


def test_the_threshold_is_the_mean_over_a_tenth_of_the_run_so_far(planted):
    trainee = make_trainee(planted, BatchTopK(k=2))
    naive, lowest = None, iter(range(1, 41))
    for n, value in enumerate(lowest, start=1):
        trainee._observe_threshold(torch.tensor([float(value), 50.0]))
        share = 1 / max(1.0, n / 10)
        naive = value if naive is None else naive + share * (value - naive)
        assert float(trainee.sae.threshold) == pytest.approx(naive, rel=1e-5)


def test_a_batch_without_a_positive_value_leaves_the_threshold(planted):
    trainee = make_trainee(planted, BatchTopK(k=2))
    stream = batches(planted, 2)
    trainee.start(stream[0])
    before = trainee.sae.threshold.clone()
    with torch.no_grad():
        trainee.sae.b_enc.fill_(-1e4)
    shown = stepped(trainee, stream[1], 0)
    assert shown.l0 == 0
    assert torch.equal(trainee.sae.threshold, before)


@pytest.mark.parametrize("sparsity", [ReLU(), TopK(k=4)])
def test_kinds_without_a_threshold_get_none(planted, sparsity):
    assert float(trained(planted, sparsity, 3)[0].sae.threshold) == -1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_batch_that_holds_no_numbers_changes_nothing(planted, value):
    trainee = make_trainee(planted, BatchTopK(k=4))
    stream = batches(planted, 3)
    trainee.start(stream[0])
    trainee.step(stream[0], 0)
    before = {name: tensor.clone() for name, tensor in trainee.state().items()}
    stream[1][3, 2] = value
    with pytest.raises(StoreError, match=r"The loss of a is (nan|inf).*visae doctor"):
        trainee.step(stream[1], 1)
    assert all(torch.equal(before[name], tensor) for name, tensor in trainee.state().items())


# State


EXTRAS = {
    **{name: {"sparsity": kind} for name, kind in ALL_KINDS.items()},
    "random prefixes": {"sparsity": TopK(k=4), "random_prefixes": 5},
    "orthogonality": {"sparsity": TopK(k=4), "orthogonality": 0.5},
    "archetypes": {"sparsity": TopK(k=4), "archetypes": ArchetypesConfig(n_centroids=40)},
}


@pytest.mark.parametrize("options", EXTRAS.values(), ids=EXTRAS)
def test_a_restored_trainee_goes_on_bit_for_bit(planted, options):
    stream = batches(planted, 20)
    first = make_trainee(planted, **options)
    first.start(stream[0])
    for number, x in enumerate(stream[:10]):
        first.step(x, number)
    state = {name: tensor.clone() for name, tensor in first.state().items()}
    second = make_trainee(planted, **options)
    second.restore(state)
    for number, x in enumerate(stream[10:], start=10):
        assert stepped(first, x, number) == stepped(second, x, number)
    for name, tensor in first.state().items():
        assert torch.equal(second.state()[name], tensor), name


def test_a_fresh_state_is_restored_too(planted):
    """Controls are saved with the group although they never step."""
    (x,) = batches(planted, 1)
    first, second = (make_trainee(planted, BatchTopK(k=4), control="untrained") for _ in range(2))
    first.start(x)
    second.restore(first.state())
    assert torch.equal(second.sae.encode(x), first.sae.encode(x))


@pytest.mark.parametrize(
    ("control", "similar"), [("none", (0.6, 0.999)), ("random-activations", (0.999, 1.1))]
)
def test_where_each_control_starts(planted, control, similar):
    trainee = make_trainee(planted, BatchTopK(k=4), control=control)
    (x,) = batches(planted, 1)
    trainee.start(x)
    directions = torch.nn.functional.normalize(trainee.sae.normalise(x), dim=1)
    best = (trainee.sae.W_dec.detach() @ directions.T).max(dim=1).values
    assert similar[0] < float(best.min())
    assert float(best.max()) < similar[1]


def test_the_untrained_control_is_random(planted):
    (x,), (y,) = batches(planted, 1), [torch.zeros(100, 16) + torch.arange(16)]
    rows = []
    for sample in (x, x.flip(0), y + torch.randn(100, 1)):
        trainee = make_trainee(planted, BatchTopK(k=4), control="untrained")
        trainee.start(sample)
        rows.append(trainee.sae.W_dec.detach().clone())
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])


@pytest.mark.parametrize(
    ("control", "kept"),
    [("frozen-decoder", {"W_dec", "b_dec"}), ("frozen-encoder", {"W_enc", "b_enc"})],
)
@pytest.mark.parametrize("sparsity", KINDS.values(), ids=KINDS)
def test_a_frozen_half_keeps_its_random_start_bit_for_bit(planted, control, kept, sparsity):
    stream = batches(planted, 12)
    trainee = make_trainee(planted, sparsity, control=control)
    trainee.start(stream[0])
    untrained = make_trainee(planted, sparsity, control="untrained")
    untrained.start(stream[0])
    figures = [stepped(trainee, x, number) for number, x in enumerate(stream)]
    start = dict(untrained.sae.named_parameters())
    for name, parameter in trainee.sae.named_parameters():
        assert torch.equal(parameter, start[name]) == (name in kept), name
    assert sum(f.nmse for f in figures[-4:]) < sum(f.nmse for f in figures[:4])


@pytest.mark.parametrize("control", ["frozen-decoder", "frozen-encoder"])
def test_a_frozen_half_stays_so_after_resuming(planted, control):
    stream = batches(planted, 8)
    first = make_trainee(planted, BatchTopK(k=4), control=control)
    first.start(stream[0])
    for number, x in enumerate(stream[:4]):
        first.step(x, number)
    state = {name: tensor.clone() for name, tensor in first.state().items()}
    second = make_trainee(planted, BatchTopK(k=4), control=control)
    second.restore(state)
    for number, x in enumerate(stream[4:], start=4):
        assert stepped(first, x, number) == stepped(second, x, number)
    assert all(torch.equal(second.state()[name], t) for name, t in first.state().items())


# Learned kinds


def saved_and_loaded(trainee, folder, stream):
    """The SAE as it comes back from disk."""
    provenance = Provenance(
        model=ModelIdentity(name="a", title="A", weights_sha256="0"),
        site="residual@0",
        layout=Layout(special=(), grid=(4, 5)),
        preprocessing=None,
        tokens="patches",
        store_digest="0",
        n_tokens=0,
        seed=0,
        control="none",
        recipe={},
    )
    save_sae(trainee.sae, folder, provenance=provenance, reference=stream[0], metrics={})
    return load_sae(folder)


@pytest.mark.parametrize(
    ("sparsity", "within"),
    [(TopK(k=4), 0.05), (BatchTopK(k=4), 0.05), (JumpReLU(target_l0=4), 0.25)],
    ids=["topk", "batch-topk", "jumprelu"],
)
def test_inference_has_the_l0_asked_for_after_saving_and_loading(
    planted, tmp_path, sparsity, within
):
    config = TrainConfig(n_tokens=100 * 200, batch_size=200)
    trainee, _ = trained(planted, sparsity, 100, config=config, learning_rate=5e-3)
    loaded = saved_and_loaded(trainee, tmp_path / "sae", batches(planted, 1, config))
    tokens = planted.activations.flatten(0, 1)
    for sae in (trainee.sae, loaded):
        l0 = sae.encode_sparse(tokens).values.numel() / len(tokens)
        assert l0 == pytest.approx(4, rel=within)


@pytest.mark.parametrize("factor", [0.1, 1.5])
def test_thresholds_move_to_where_the_target_is_met(planted, factor):
    """A logarithmic threshold froze under Adam; from either side, θ has to come to the target."""
    kind = JumpReLU(target_l0=4, bandwidth=0.3)
    config = TrainConfig(n_tokens=150 * 200, batch_size=200, auxk_alpha=0.0)
    trainee = make_trainee(planted, kind, config=config, learning_rate=3e-2)
    stream = batches(planted, 150, config)
    trainee.start(stream[0])
    with torch.no_grad():
        trainee.sae.learned["threshold"].mul_(factor)
    figures = [stepped(trainee, x, number) for number, x in enumerate(stream)]
    assert abs(figures[0].l0 - 4) > 1.5
    assert figures[-1].l0 == pytest.approx(4, rel=0.25)
    assert trainee.sae.learned["threshold"].std() > 0


def test_thresholds_stay_at_or_above_zero(planted):
    trainee, _ = trained(planted, JumpReLU(target_l0=64.0, bandwidth=0.5), 12, learning_rate=0.5)
    threshold = trainee.sae.learned["threshold"]
    assert (threshold >= 0).all()
    assert (threshold == 0).any()


@pytest.mark.parametrize("sparsity", ALL_KINDS.values(), ids=ALL_KINDS)
def test_every_kind_learns(planted, sparsity):
    _, figures = trained(planted, sparsity, 30, learning_rate=1e-2)
    nmse = [f.nmse for f in figures]
    assert sum(nmse[-5:]) < 0.9 * sum(nmse[1:6])


# Prefixes, orthogonality, archetypes


def test_random_prefixes_change_with_step_and_seed_alone(planted):
    first, second = (
        make_trainee(planted, TopK(k=4), random_prefixes=5, seed=seed) for seed in (0, 1)
    )
    (x,) = batches(planted, 1)
    first.start(x)
    start = {name: tensor.clone() for name, tensor in first.state().items()}

    def loss(trainee, number):
        trainee.restore(start)
        return float(trainee.step(x, number).total)

    losses = [loss(first, number) for number in (0, 0, 1)]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]
    assert loss(second, 0) != losses[0]


def test_orthogonality_is_added_with_its_weight(planted):
    (x,) = batches(planted, 1)
    without = make_trainee(planted, TopK(k=4))
    asked = make_trainee(planted, TopK(k=4), orthogonality=0.5)
    without.start(x)
    asked.start(x)
    alike = orthogonality_loss(asked.sae.W_dec.detach(), torch.Generator())
    more = asked.step(x, 0).total - without.step(x, 0).total
    assert float(more) == pytest.approx(0.5 * float(alike), rel=1e-4)
    for number, batch in enumerate(batches(planted, 20), start=1):
        asked.step(batch, number)
        without.step(batch, number)
    of_one, of_other = (
        float(orthogonality_loss(t.sae.W_dec.detach(), torch.Generator())) for t in (asked, without)
    )
    assert of_one < of_other


def test_archetypes_hold_the_decoder(planted):
    """W_dec stays a mixture of centroids, plus an offset of at most δ, made unit."""
    config = ArchetypesConfig(n_centroids=40, delta=0.2)
    trainee, figures = trained(planted, TopK(k=4), 20, archetypes=config, learning_rate=1e-2)
    state = trainee.state()
    mixture, offset = trainee._archetypes.mixture.detach(), state["archetypes.offset"].detach()
    assert (mixture >= 0).all()
    torch.testing.assert_close(mixture.sum(1), torch.ones(64))
    assert (offset.norm(dim=1) <= 0.2 + 1e-6).all()
    assert (offset.norm(dim=1) > 0.1).any()
    rows = torch.nn.functional.normalize(mixture @ state["archetypes.centroids"] + offset, dim=1)
    torch.testing.assert_close(trainee.sae.W_dec.detach(), rows)
    assert figures[-1].nmse < figures[0].nmse


def test_archetypes_get_the_gradient_of_the_rows(planted):
    trainee = make_trainee(planted, TopK(k=4), archetypes=ArchetypesConfig(n_centroids=40))
    (x,) = batches(planted, 1)
    trainee.start(x)
    archetypes = trainee._archetypes
    before = trainee.sae.W_dec.detach().clone()
    (expected,) = torch.autograd.grad(
        ((archetypes.rows() @ archetypes.rows().T).cos()).sum(), archetypes.weights
    )
    rows = before.requires_grad_()
    torch.autograd.backward((rows @ rows.T).cos().sum())
    trainee.sae.W_dec.grad = rows.grad
    trainee._engine._config = dataclasses.replace(trainee._config, clip_norm=1e9)
    trainee._engine._project_and_clip()
    torch.testing.assert_close(archetypes.weights.grad, expected, rtol=1e-3, atol=1e-4)


# Transcoders


def test_a_transcoder_learns_the_other_site(planted):
    """The target is a rotation of the input: an SAE's decoder could not give it."""
    generator = torch.Generator().manual_seed(3)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    stream = batches(planted, 30)
    targets = [3 * x @ rotation + 1 for x in stream]
    trainee = make_trainee(planted, TopK(k=4), target_site="mlp@0", learning_rate=1e-2)
    everything = torch.cat(targets)
    trainee.sae.target_mean.copy_(everything.mean(0))
    trainee.sae.target_scale.fill_((everything - everything.mean(0)).std())
    trainee.start(stream[0], targets[0])
    figures = [
        stepped(trainee, x, number, target)
        for number, (x, target) in enumerate(zip(stream, targets, strict=True))
    ]
    nmse = [f.nmse for f in figures]  # the rows begin as tokens of the first batch
    assert sum(nmse[-5:]) < 0.85 * sum(nmse[1:6])
    given, wanted = trainee.sae(stream[-1]), targets[-1]
    error = (given - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
    assert float(error) == pytest.approx(nmse[-1], rel=0.1)
