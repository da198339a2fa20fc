"""A network of one's own: wrapped, loaded by name, recorded, edited, resumed."""

import sys

import pytest
import torch
from torch import nn

from visae.activations.format import RecordConfig
from visae.activations.record import record
from visae.activations.store import ActivationStore
from visae.errors import ModelError
from visae.images.opening import open_images
from visae.models.config import ModelConfig
from visae.models.custom import wrap_model
from visae.models.layout import Layout
from visae.models.loading import load_model
from visae.models.preprocessing import Preprocessing
from visae.models.protocol import Output, VisionModel

PREPROCESSING = Preprocessing(size=(16, 24))
TOKENS = Layout(special=("cls",), grid=(2, 3))


class PlainCNN(nn.Sequential):
    """Convolutions and a head, with modules that work in place; gives logits."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 4, 4),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
        )


class Mixing(nn.Module):
    """A block of tokens."""

    def __init__(self):
        super().__init__()
        self.across, self.within = nn.Linear(7, 7), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.across(x.mT).mT + self.within(x).relu()


class Mixer(nn.Module):
    """A class token and patches of 8 × 8 pixels through three blocks; gives tokens."""

    def __init__(self, skips=False):
        super().__init__()
        self.skips = skips
        self.stem = nn.Conv2d(3, 8, 8, 8)
        self.cls = nn.Parameter(torch.zeros(1, 1, 8))
        self.blocks = nn.ModuleList(Mixing() for _ in range(3))

    def forward(self, pixels):
        x = self.stem(pixels).flatten(2).mT
        first = x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return x + first if self.skips else x


class ChannelsLast(nn.Module):
    """Gives a map with the channels last, and a tuple on the way."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 4, 4, 4)
        self.turned = nn.Identity()
        self.paired = Paired()

    def forward(self, pixels):
        x = self.turned(self.embed(pixels).permute(0, 2, 3, 1))
        return self.paired(x.flatten(1, 2))[0] * 2


class Paired(nn.Module):
    def forward(self, x):
        return x + 1, "something else"


def seeded(make, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(**options)


def images(n=3):
    return torch.randn(n, 3, 16, 24, generator=torch.Generator().manual_seed(0))


def cnn(**changes):
    settings = {"name": "mine/cnn", "preprocessing": PREPROCESSING, "sites": {"0": None, "2": None}}
    return wrap_model(seeded(PlainCNN), **settings | changes)


def mixer(*, skips=False, **changes):
    sites = {f"blocks.{index}": TOKENS for index in range(3)}
    settings = {"name": "mine/mixer", "preprocessing": PREPROCESSING, "sites": sites}
    return wrap_model(seeded(Mixer, skips=skips), **settings | changes)


def other():
    sites = {"turned": None, "paired": Layout(special=(), grid=(4, 6))}
    return wrap_model(seeded(ChannelsLast), name="mine/o", preprocessing=PREPROCESSING, sites=sites)


@pytest.mark.parametrize(
    ("make", "site", "layout"),
    [
        (cnn, "0", Layout(special=(), grid=(4, 6))),
        (cnn, "2", Layout(special=(), grid=(4, 6))),
        (mixer, "blocks.1", TOKENS),
        (other, "turned", Layout(special=(), grid=(4, 6))),
        (other, "paired", Layout(special=(), grid=(4, 6))),
    ],
)
def test_every_site_is_read_edited_and_resumed(make, site, layout):
    model = make()
    assert isinstance(model, VisionModel)
    assert site in model.sites
    assert model.layout(site) == layout
    pixels = images()
    trace = model.trace(pixels, [site])
    tokens = trace.tokens[site]
    assert torch.equal(model.tokens(pixels, [site])[site], tokens)
    with torch.no_grad():
        plain = model.architecture.network(pixels)
    same = model.resume(trace, site, tokens)
    given = same.tokens if same.logits is None else same.logits
    assert torch.equal(given, plain)
    edited = tokens.clone()
    edited[:, 3] += 5
    assert not torch.equal(model.resume(trace, site, edited).tokens, trace.output.tokens)


def test_final_tokens_of_a_classifier_are_those_of_its_last_site():
    model = cnn()
    trace = model.trace(images(), ["0", "2"])
    assert torch.equal(trace.output.tokens, trace.tokens["2"])
    moved = model.resume(trace, "2", trace.tokens["2"] + 1)
    assert torch.equal(moved.tokens, trace.tokens["2"] + 1)


def test_what_a_network_calls_output_is_its_output():
    class Both(Mixer):
        def forward(self, pixels):
            tokens = super().forward(pixels)
            return Output(tokens=tokens, logits=tokens[:, 0], embedding=tokens.mean(1))

    network = seeded(Both)
    sites = {"blocks.0": TOKENS}
    model = wrap_model(network, name="mine/both", preprocessing=PREPROCESSING, sites=sites)
    output = model.trace(images(), ["blocks.0"]).output
    assert torch.equal(output.embedding, output.tokens.mean(1))


def test_blocks_are_resumed_from():
    blocks = [f"blocks.{index}" for index in range(3)]
    model, whole = mixer(blocks=blocks), mixer()
    assert model.sites == ("residual@0", "residual@1", "residual@2")
    seen = []
    model.architecture.network.blocks[0].within.register_forward_hook(lambda *_: seen.append(1))
    trace = model.trace(images(), ["residual@1"])
    seen.clear()
    tokens = trace.tokens["residual@1"] * 2
    edited = model.resume(trace, "residual@1", tokens)
    assert seen == []
    wanted = whole.resume(whole.trace(images(), ["blocks.1"]), "blocks.1", tokens)
    assert torch.equal(edited.tokens, wanted.tokens)


@pytest.mark.parametrize(
    ("skips", "blocks"),
    [
        (True, ["blocks.0", "blocks.1", "blocks.2"]),
        (False, ["blocks.1", "blocks.0", "blocks.2"]),
        (False, ["blocks.0", "blocks.2", "blocks.1"]),
        (False, ["blocks.0", "blocks.1.within", "blocks.2"]),
    ],
)
def test_blocks_that_do_not_follow_one_another_are_refused(skips, blocks):
    with pytest.raises(ModelError, match="do not follow one another"):
        mixer(skips=skips, blocks=blocks)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sites": {}}, "No site is named"),
        ({"sites": {"conv": None}}, "mine/cnn has no site conv"),
        ({"sites": {"6": None}}, r"gives a Tensor of shape \(1, 5\)"),
        ({"sites": {"2": Layout(special=(), grid=(2, 2))}}, r"tensor of shape \(1, 8, 4, 6\)"),
        ({"blocks": ["second"]}, "mine/cnn has no module second"),
    ],
)
def test_what_is_no_site_is_refused(changes, reason):
    with pytest.raises(ModelError, match=reason):
        cnn(**changes)


def test_a_layout_of_other_tokens_is_refused():
    layout = Layout(special=(), grid=(2, 3))
    with pytest.raises(ModelError, match="gives 7 tokens, and its layout says 6"):
        mixer(sites={"blocks.0": layout})


def test_a_network_that_gives_something_else_is_refused():
    class Dictionary(Mixer):
        def forward(self, pixels):
            return {"features": super().forward(pixels)}

    with pytest.raises(ModelError, match="The network gives a dict"):
        wrap_model(Dictionary(), name="m", preprocessing=PREPROCESSING, sites={"blocks.0": TOKENS})


def test_a_network_without_weights_is_a_model():
    network = nn.Sequential(nn.AvgPool2d(8))
    model = wrap_model(network, name="mine/mean", preprocessing=PREPROCESSING, sites={"0": None})
    assert model.tokens(images(), ["0"])["0"].shape == (3, 6, 3)


# By name, as on the command line

MODULE = """
import torch
from torch import nn
from visae.models.custom import wrap_model
from visae.models.preprocessing import Preprocessing
from visae.models.protocol import VisionModel

called = []

def small_cnn() -> VisionModel:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 4, 2, 2))
    size = Preprocessing(size=(32, 32))
    return wrap_model(network, name="mine/small-cnn", preprocessing=size, sites={"1": None})

def undeclared():
    called.append(1)

def liar() -> VisionModel:
    return 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the user's in the current folder."""
    (tmp_path / "my_visae_models.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        yield "python:my_visae_models:"
    sys.modules.pop("my_visae_models", None)


def test_a_model_named_by_its_function_is_recorded_and_opened_again(
    module, tmp_path, planted_folder
):
    config = ModelConfig(model=module + "small_cnn", title="Small")
    path_before = list(sys.path)
    model = load_model(config, device="cpu")
    assert sys.path == path_before
    assert model.identity.title == "Small"
    recording = RecordConfig(sites=("1",), dtype="float32", batch_size=8)
    record(
        open_images(planted_folder),
        model,
        tmp_path / "store",
        config=recording,
        model_config=config,
    )
    store = ActivationStore(tmp_path / "store")
    again = load_model(store.model, device="cpu")
    assert again.identity == model.identity
    tokens = store.shard("1", 0).activations
    assert tokens.shape == (20, 64, 8)
    source = open_images(planted_folder)
    view = again.preprocessing.view(source.load(store.images.refs[0]).pixels)
    trace = again.trace(again.preprocessing.pixels([view]), ["1"])
    torch.testing.assert_close(trace.tokens["1"][0], tokens[0])
    assert torch.equal(again.resume(trace, "1", trace.tokens["1"]).tokens, trace.output.tokens)
    assert not torch.equal(
        again.resume(trace, "1", trace.tokens["1"] + 1).tokens, trace.output.tokens
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("small_cn", r"has no function small_cn.*small_cnn"),
        ("called", "has no function called"),
        ("undeclared", r"does not say that it returns a model.*-> VisionModel"),
        ("liar", "gives a int instead of a VisionModel"),
        ("", "is not the name of a function"),
    ],
)
def test_a_function_that_makes_no_model_is_refused(module, name, reason):
    with pytest.raises(ModelError, match=reason):
        load_model(ModelConfig(model=module + name))
    loaded = sys.modules.get("my_visae_models")
    assert loaded is None or loaded.called == []


@pytest.mark.parametrize(
    "model", ["python:no_such_module:f", "python:f", "python:a:b:c", "python:"]
)
def test_a_module_that_is_not_there_is_refused(model):
    with pytest.raises(ModelError, match=r"cannot be imported|not the name of a function"):
        load_model(ModelConfig(model=model))


def test_options_that_the_function_decides_are_refused(module):
    config = ModelConfig(model=module + "small_cnn", image_size=64)
    with pytest.raises(ModelError, match=r"takes no --weights, --image-size or --revision"):
        load_model(config)
