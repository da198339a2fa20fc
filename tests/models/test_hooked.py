"""Resuming any network by its description: tuples, named arguments, heads, early ends."""

import threading

import pytest
import torch
from torch import nn

from visae.errors import ModelError
from visae.models.architecture import Architecture, Block, Heads
from visae.models.hooked import HookedModel, identify
from visae.models.preprocessing import Preprocessing
from visae.models.protocol import Output


class Attention(nn.Module):
    """Two heads; gives its output and something else."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.proj = nn.Linear(8, 8)

    def forward(self, x, bias):
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT + bias).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2)), weights


class TupleBlock(nn.Module):
    """A block that is called by names and hands on a bias, as some language models' do."""

    def __init__(self):
        super().__init__()
        self.attention = Attention()
        self.mlp = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))

    def forward(self, hidden, *, bias):
        hidden = hidden + self.attention(hidden, bias)[0]
        hidden += self.mlp(hidden)  # in place
        return hidden, bias * 0.5


class Network(nn.Module):
    """Patches of 4 × 4 pixels, a class token, three blocks, a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.cls = nn.Parameter(torch.zeros(1, 1, 8))
        self.bias = nn.Parameter(torch.zeros(1, 2, 7, 7))
        self.blocks = nn.ModuleList(TupleBlock() for _ in range(3))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, pixels):
        patches = self.stem(pixels).flatten(2).mT
        hidden, bias = torch.cat([self.cls.expand(len(pixels), -1, -1), patches], 1), self.bias
        for block in self.blocks:
            hidden, bias = block(hidden=hidden, bias=bias)
        hidden = self.norm(hidden)
        return Output(tokens=hidden, logits=self.head(hidden[:, 0]), embedding=hidden.mean(1))


def describe(network, **changes):
    blocks = tuple(
        Block(
            module=block,
            mlp=block.mlp,
            attention=block.attention,
            heads=Heads(projection=block.attention.proj, n_heads=2),
        )
        for block in network.blocks
    )
    settings = {
        "network": network,
        "forward": network,
        "blocks": blocks,
        "is_chain": True,
        "stem": network.stem,
        "special": ("cls",),
        "grids": ((2, 3),),
    }
    return Architecture(**settings | changes)


def make(**changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Network()
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.5)
    return HookedModel(
        describe(network, **changes),
        identity=identify(network, name="test/tuples", title="Tuples"),
        preprocessing=Preprocessing(size=(8, 12)),
    )


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(3, 3, 8, 12, generator=torch.Generator().manual_seed(0))


SITES = tuple(
    f"{kind}@{index}" for index in range(3) for kind in ("residual", "mlp", "attention", "heads")
)
MORE_SITES = ("heads@0.1", "heads@2.0", "blocks.1.attention.qkv", "norm", "blocks.1")


def runs_of(modules, run):
    """How often each module runs while ``run`` does."""
    counts = [0] * len(modules)

    def count(index):
        def see(*_):
            counts[index] += 1

        return see

    hooks = [m.register_forward_hook(count(i)) for i, m in enumerate(modules)]
    run()
    for hook in hooks:
        hook.remove()
    return counts


def test_the_sites_are_the_parts_of_the_blocks(model):
    assert model.sites == SITES
    assert model.layout("residual@2").special == ("cls",)
    assert [model.d_model(site) for site in ("residual@0", "heads@1", "heads@1.1")] == [8, 8, 4]


def test_without_blocks_the_sites_are_the_stages_that_give_tokens():
    staged = make(blocks=(), is_chain=False, stages=("", "gone", "stem", "head", "norm"))
    assert staged.sites == ("stem", "norm")


@pytest.mark.parametrize("site", SITES + MORE_SITES)
def test_resuming_is_the_plain_pass_and_an_edit_is_not(model, pixels, site):
    trace = model.trace(pixels, [site])
    before = trace.tokens[site].clone()
    for _ in range(2):  # nothing of the first time is left behind
        same = model.resume(trace, site, trace.tokens[site])
        for got, wanted in zip(same, trace.output, strict=True):
            assert torch.equal(got, wanted)
    assert torch.equal(trace.tokens[site], before)
    edited = model.resume(trace, site, trace.tokens[site] + 1.5 * torch.randn_like(before))
    assert not torch.equal(edited.logits, trace.output.logits)


@pytest.mark.parametrize("site", SITES)
def test_leaving_blocks_out_changes_nothing(model, pixels, site):
    """The edit of a chain is that of the whole network run again."""
    whole = make(is_chain=False)
    tokens = torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(1))
    outputs = [m.resume(m.trace(pixels, [site]), site, tokens) for m in (model, whole)]
    for got, wanted in zip(*outputs, strict=True):
        assert torch.equal(got, wanted)


def test_blocks_before_the_site_do_not_run(model, pixels):
    parts = [block.mlp for block in model.architecture.network.blocks]
    for site, runs in {
        "residual@0": [0, 1, 1],
        "mlp@1": [0, 1, 1],
        "heads@0": [1, 1, 1],
        "blocks.2.attention.qkv": [0, 0, 1],
        "residual@2": [0, 0, 0],
        "norm": [1, 1, 1],
    }.items():
        trace = model.trace(pixels, [site])
        counted = runs_of(parts, lambda t=trace, s=site: model.resume(t, s, t.tokens[s]))
        assert counted == runs, site


def test_the_stem_works_for_one_image_when_a_network_is_resumed(model, pixels):
    seen = []
    stem = model.architecture.network.stem
    trace = model.trace(pixels, ["mlp@1"])
    forward = stem._conv_forward
    stem._conv_forward = lambda x, *rest: seen.append(len(x)) or forward(x, *rest)
    try:
        model.resume(trace, "mlp@1", trace.tokens["mlp@1"])
    finally:
        del stem._conv_forward
    assert seen == [1]


def test_tokens_end_the_pass_after_the_last_site(model, pixels):
    parts = [block.mlp for block in model.architecture.network.blocks]
    model.tokens(pixels, ["mlp@1", "residual@0"])  # measured
    assert runs_of(parts, lambda: model.tokens(pixels, ["mlp@1", "residual@0"])) == [1, 1, 0]
    assert runs_of(parts, lambda: model.tokens(pixels, ["attention@0"])) == [0, 0, 0]
    assert model.tokens(pixels, []) == {}


@pytest.mark.parametrize("sites", [SITES[::-1], ("mlp@2", "residual@0", "heads@1.0", "stem")])
def test_tokens_are_those_of_the_trace(model, pixels, sites):
    tokens, trace = model.tokens(pixels, sites), model.trace(pixels, sites)
    assert list(tokens) == list(sites)
    for site in sites:
        assert torch.equal(tokens[site], trace.tokens[site])


def test_a_site_named_twice_is_read_once(model, pixels):
    assert list(model.tokens(pixels, ["mlp@1", "mlp@1"])) == ["mlp@1"]


def test_a_head_is_a_part_of_the_heads(model, pixels):
    trace = model.trace(pixels, ["heads@1", "heads@1.0", "heads@1.1"])
    heads, first, second = trace.tokens.values()
    assert torch.equal(torch.cat([first, second], 2), heads)
    changed = heads.clone()
    changed[..., 4:] = 0
    whole = model.resume(trace, "heads@1", changed)
    alone = model.resume(trace, "heads@1.1", torch.zeros_like(second))
    assert torch.equal(whole.logits, alone.logits)
    assert not torch.equal(whole.logits, trace.output.logits)


def test_heads_make_the_attention(model, pixels):
    heads, attention = model.tokens(pixels, ["heads@2", "attention@2"]).values()
    projection = model.architecture.blocks[2].heads.projection
    assert torch.equal(projection(heads), attention)


@pytest.mark.parametrize(
    ("site", "there_are"),
    [
        ("heads@1.2", "block 1 has 2 heads, numbered from 0"),
        ("heads@3", "3 blocks, numbered from 0"),
        ("heads@3.0", "3 blocks, numbered from 0"),
        ("mlp@1.0", "3 blocks"),
        ("residual@1.0", "3 blocks"),
        ("heads@1.01", "3 blocks"),
    ],
)
def test_a_head_that_is_not_there_is_refused(model, site, there_are):
    with pytest.raises(ModelError, match=f"has no site {site}.*{there_are}"):
        model.layout(site)


def test_heads_of_a_fused_attention_are_refused_with_the_reason():
    network = Network()
    blocks = tuple(Block(module=block, mlp=block.mlp) for block in network.blocks)
    fused = make(blocks=blocks, no_heads="its attention is one fused operation")
    assert not any("heads" in site or "attention" in site for site in fused.sites)
    with pytest.raises(ModelError, match="has no site heads@0: its attention is one fused"):
        fused.layout("heads@0")


def test_a_module_that_gives_a_tuple_is_refused(model):
    with pytest.raises(ModelError, match=r"The module blocks\.1\.attention gives a tuple"):
        model.layout("blocks.1.attention")


def test_a_size_that_the_network_cannot_take_is_named():
    network = nn.Sequential(nn.Conv2d(3, 4, 8, 8))
    model = HookedModel(
        Architecture(network=network, forward=lambda pixels: Output(network(pixels), None)),
        identity=identify(network, name="test/conv", title="Conv"),
        preprocessing=Preprocessing(size=(4, 6)),
    )
    with pytest.raises(ModelError, match=r"cannot run on an image of 4 × 6 pixels.*--image-size"):
        model.layout("0")


def test_an_error_on_the_way_leaves_nothing_behind(pixels):
    model = make()
    network = model.architecture.network
    trace = model.trace(pixels, ["mlp@1", "residual@1"])
    network.norm.register_forward_pre_hook(lambda *_: 1 / 0)
    for site in ("mlp@1", "residual@1"):
        with pytest.raises(ZeroDivisionError):
            model.resume(trace, site, trace.tokens[site])
        with pytest.raises(ZeroDivisionError):
            model.trace(pixels, [site])
    network.norm._forward_pre_hooks.clear()
    for module in network.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert torch.equal(network(pixels).logits, trace.output.logits)


@pytest.mark.parametrize("shape", [(3, 3, 12, 8), (3, 3, 8, 13)])
def test_pixels_of_another_size_are_refused(model, shape):
    for read in (model.tokens, model.trace):
        with pytest.raises(ModelError, match=r"The pixels have shape .* instead of"):
            read(torch.zeros(shape), ["mlp@1"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    network = Network()
    with torch.no_grad():
        network.blocks[1].mlp[0].weight[2, 3] = value
    with pytest.raises(ModelError, match=r"NaN or infinite.*blocks\.1\.mlp\.0\.weight"):
        identify(network, name="x", title="x")


def test_threads_do_not_read_each_others_images(model):
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randn(2, 3, 8, 12, generator=generator) for _ in range(4)]
    wanted = [model.tokens(batch, ["mlp@2"])["mlp@2"] for batch in batches]
    wrong = []

    def read(number):
        for _ in range(20):
            if not torch.equal(model.tokens(batches[number], ["mlp@2"])["mlp@2"], wanted[number]):
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
