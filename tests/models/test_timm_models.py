import contextlib

import pytest
import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import ResPostBlock

from visae.errors import ModelError
from visae.models.layout import Layout
from visae.models.protocol import VisionModel
from visae.models.timm_models import timm_model

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
ARCHITECTURES = {
    "deit_tiny_distilled_patch16_224": ((32, 32), VIT),
    "vit_base_patch16_siglip_224": ((32, 32), VIT | {"num_classes": 4}),
    "vit_small_patch16_dinov3": ((32, 32), VIT | {"num_classes": 4}),
    "beit_base_patch16_224": ((32, 32), VIT),
    "cait_xxs24_224": ((32, 32), VIT),
    "vit_base_patch16_xp_224": ((32, 32), VIT | {"num_classes": 4}),
    "convnext_atto": ((64, 96), {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}),
    "resnet10t": ((64, 96), {"channels": (8, 8, 16, 16)}),
    "swin_tiny_patch4_window7_224": (
        (64, 64),
        {"img_size": 64, "window_size": 4, "embed_dim": 16}
        | {"depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2)},
    ),
}


def images(model, n=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, *model.preprocessing.size, generator=generator)


def plain(model, pixels):
    with torch.no_grad():
        return model.architecture.network(pixels)


def wrap(network, size, **changes):
    data_config = {
        "input_size": (3, *size),
        "crop_pct": 0.9,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
    }
    return timm_model(network, name="timm/x", title="X", data_config=data_config | changes)


@pytest.fixture(scope="module")
def architecture():
    """Small networks of many architectures, with random weights, each made once."""
    made = {}

    def make(name):
        if name not in made:
            size, options = ARCHITECTURES[name]
            with torch.random.fork_rng():
                torch.manual_seed(0)
                network = timm.create_model(name, pretrained=False, **options)
                for parameter in network.parameters():
                    torch.nn.init.normal_(parameter, std=0.3)
            made[name] = wrap(network, size)
        return made[name]

    return make


def check_every_site(model):
    """Tokens have the layout; resuming with them is the plain pass bit for bit, else not."""
    pixels = images(model)
    whole = plain(model, pixels)
    trace = model.trace(pixels, model.sites)
    assert torch.equal(trace.output.logits, whole)
    for site in model.sites:
        tokens = trace.tokens[site]
        assert tokens.shape == (3, model.layout(site).n_tokens, model.d_model(site))
        same = model.resume(trace, site, tokens)
        assert torch.equal(same.logits, whole)
        assert torch.equal(same.tokens, trace.output.tokens)
        noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1))
        assert not torch.equal(model.resume(trace, site, tokens + noise).logits, whole)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_resumed_bit_for_bit(architecture, name):
    check_every_site(architecture(name))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reg_tokens": 3},
        {"init_values": None},
        {"class_token": False, "global_pool": "avg"},
        {"img_size": (16, 40)},
        {"block_fn": ResPostBlock},
    ],
)
def test_every_plain_vit_is_resumed_bit_for_bit(make_vit, options):
    check_every_site(make_vit(**options))


def test_it_is_a_vision_model(tiny_vit):
    assert isinstance(tiny_vit, VisionModel)


def test_sites_of_a_vit(tiny_vit):
    assert tiny_vit.sites == tuple(
        f"{kind}@{i}" for i in range(3) for kind in ("residual", "mlp", "attention", "heads")
    )


@pytest.mark.parametrize(
    ("name", "sites"),
    [
        ("resnet10t", ("act1", "layer1", "layer2", "layer3", "layer4")),
        ("vit_base_patch16_xp_224", ("residual@0", "residual@1")),
    ],
)
def test_sites_are_those_an_architecture_has(architecture, name, sites):
    assert architecture(name).sites == sites


@pytest.mark.parametrize(
    ("options", "layout"),
    [
        ({}, Layout(special=("cls",), grid=(4, 4))),
        ({"img_size": (16, 40)}, Layout(special=("cls",), grid=(2, 5))),
        ({"reg_tokens": 2}, Layout(special=("cls", "register0", "register1"), grid=(4, 4))),
        (
            {"reg_tokens": 1, "class_token": False, "global_pool": "avg"},
            Layout(special=("register0",), grid=(4, 4)),
        ),
    ],
)
def test_layouts_of_vits(make_vit, options, layout):
    model = make_vit(depth=1, **options)
    assert model.layout("residual@0") == layout
    assert model.d_model("mlp@0") == 32


@pytest.mark.parametrize(
    ("name", "site", "layout"),
    [
        (
            "deit_tiny_distilled_patch16_224",
            "residual@1",
            Layout(special=("cls", "distillation"), grid=(4, 4)),
        ),
        ("cait_xxs24_224", "residual@1", Layout(special=(), grid=(4, 4))),
        ("convnext_atto", "stages.0", Layout(special=(), grid=(16, 24))),
        ("convnext_atto", "stages.0.blocks.0.mlp", Layout(special=(), grid=(16, 24))),
        ("resnet10t", "layer4", Layout(special=(), grid=(2, 3))),
        ("swin_tiny_patch4_window7_224", "layers.1", Layout(special=(), grid=(8, 8))),
    ],
)
def test_layouts_of_other_architectures(architecture, name, site, layout):
    assert architecture(name).layout(site) == layout


def test_patches_come_row_by_row(make_vit):
    """A patch's own pixels change its token of the embedding, and no other token."""
    model = make_vit(img_size=(16, 40), reg_tokens=1)
    site = "norm_pre"
    pixels = images(model, 1)
    before = model.trace(pixels, [site]).tokens[site]
    row, column = 1, 3
    pixels[:, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] += 1
    changed = (model.trace(pixels, [site]).tokens[site] != before).any(dim=2)
    n_columns = model.layout(site).grid[1]
    assert torch.nonzero(changed).tolist() == [[0, 2 + row * n_columns + column]]


@pytest.mark.parametrize(("name", "stride"), [("convnext_atto", 4), ("resnet10t", 2)])
def test_a_feature_map_is_read_row_by_row(architecture, name, stride):
    model = architecture(name)
    site = {"convnext_atto": "stem", "resnet10t": "conv1.0"}[name]
    pixels = images(model, 1)
    before = model.trace(pixels, [site]).tokens[site]
    row, column = 5, 9
    pixels[:, :, row * stride, column * stride] += 1
    changed = (model.trace(pixels, [site]).tokens[site] != before).any(dim=2)[0]
    assert changed[row * model.layout(site).grid[1] + column]
    assert changed.sum() <= 4


def what_blocks_add(network, pixels, index, kind):
    """The change of the residual stream inside a block, from the inputs and outputs around it."""
    seen = {}
    block = network.blocks[index]
    after_attention = block.norm2 if kind == "pre" else None
    with contextlib.ExitStack() as stack:
        for key, module in {"block": block, "norm2": after_attention}.items():
            if module is not None:
                hook = module.register_forward_hook(
                    lambda _m, i, o, key=key: seen.update({key: (i[0].clone(), o.clone())})
                )
                stack.callback(hook.remove)
        with torch.no_grad():
            network(pixels)
    return seen


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "beit_base_patch16_224"])
def test_mlp_and_attention_are_what_the_block_adds(architecture, name):
    model = architecture(name)
    pixels = images(model)
    seen = what_blocks_add(model.architecture.network, pixels, 1, "pre")
    trace = model.trace(pixels, ["attention@1", "mlp@1", "residual@1"])
    middle = seen["norm2"][0]
    torch.testing.assert_close(trace.tokens["attention@1"], middle - seen["block"][0])
    torch.testing.assert_close(trace.tokens["mlp@1"], trace.tokens["residual@1"] - middle)


@pytest.mark.parametrize("options", [{}, {"block_fn": ResPostBlock}])
def test_the_parts_of_a_vit_block_sum_to_its_residual(make_vit, options):
    model = make_vit(**options)
    sites = ["residual@0", "attention@1", "mlp@1", "residual@1"]
    before, attention, mlp, after = model.trace(images(model), sites).tokens.values()
    torch.testing.assert_close(before + attention + mlp, after)


def test_sites_may_be_asked_for_in_any_order(tiny_vit):
    pixels = images(tiny_vit)
    sites = ["residual@2", "mlp@0", "residual@0"]
    together = tiny_vit.trace(pixels, sites).tokens
    for site in sites:
        assert torch.equal(together[site], tiny_vit.trace(pixels, [site]).tokens[site])


def test_several_sites_are_resumed_from_one_trace(tiny_vit):
    pixels = images(tiny_vit)
    trace = tiny_vit.trace(pixels, ["mlp@0", "attention@2", "blocks.1.mlp.fc2"])
    for site in trace.tokens:
        resumed = tiny_vit.resume(trace, site, trace.tokens[site])
        assert torch.equal(resumed.logits, trace.output.logits)


def test_a_module_path_of_a_vit_resumes_like_its_named_site(make_vit):
    model = make_vit(init_values=None)
    trace = model.trace(images(model), ["mlp@1", "blocks.1.mlp"])
    assert torch.equal(trace.tokens["mlp@1"], trace.tokens["blocks.1.mlp"])
    tokens = trace.tokens["mlp@1"] * 2
    named = model.resume(trace, "mlp@1", tokens)
    assert torch.equal(named.logits, model.resume(trace, "blocks.1.mlp", tokens).logits)


def test_what_is_captured_is_not_changed_by_later_layers_in_place(architecture):
    model = architecture("resnet10t")
    site = "layer1.0.bn1"  # a ReLU follows that works in place
    assert model.architecture.network.layer1[0].act1.inplace
    trace = model.trace(images(model), [site])
    assert (trace.tokens[site] < 0).any()


def test_resuming_leaves_the_tokens_as_they_are(architecture):
    model = architecture("resnet10t")
    site = "layer1.0.bn1"
    trace = model.trace(images(model), [site])
    tokens = trace.tokens[site].clone()
    model.resume(trace, site, tokens)
    assert torch.equal(tokens, trace.tokens[site])


def test_resuming_leaves_no_hook_behind(tiny_vit):
    pixels = images(tiny_vit)
    trace = tiny_vit.trace(pixels, ["mlp@1"])
    tiny_vit.resume(trace, "mlp@1", torch.zeros_like(trace.tokens["mlp@1"]))
    assert torch.equal(plain(tiny_vit, pixels), trace.output.logits)


@pytest.mark.parametrize("shape", [(3, 19, 1), (3, 1, 32), (1, 19, 32), (3, 18, 32)])
@pytest.mark.parametrize("site", ["residual@1", "mlp@1", "blocks.1.mlp"])
def test_tokens_of_another_shape_are_refused(tiny_vit, site, shape):
    trace = tiny_vit.trace(images(tiny_vit), [site])
    with pytest.raises(ModelError, match=r"instead of \(3, 19, 32\)"):
        tiny_vit.resume(trace, site, torch.zeros(shape))


def test_copies_of_a_trace_are_the_same_images_again(tiny_vit):
    for site in ("residual@1", "mlp@1"):
        trace = tiny_vit.trace(images(tiny_vit, 2), [site])
        tokens = trace.tokens[site].repeat(3, 1, 1)
        logits = tiny_vit.resume(trace.repeat(site, 3), site, tokens).logits
        torch.testing.assert_close(logits, trace.output.logits.repeat(3, 1))


def test_activations_can_be_learned_from(tiny_vit):
    tokens = tiny_vit.trace(images(tiny_vit), ["residual@1"]).tokens["residual@1"]
    probe = torch.nn.Linear(32, 2)
    torch.autograd.backward(probe(tokens).square().mean())
    assert probe.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("site", "nearest"),
    [
        ("residual@3", "residual@2"),
        ("resdual@1", "residual@1"),
        ("residual@-1", "residual@1"),
        ("residual@01", "residual@1"),
        ("residual@²", "residual@2"),
        ("residual", "residual@0"),
        ("residual@", "residual@0"),
        ("blocks.1.atn", "blocks.1.attn"),
        ("", "residual@0"),
    ],
)
def test_an_unknown_site_names_the_nearest(tiny_vit, site, nearest):
    with pytest.raises(ModelError, match="has no site") as caught:
        tiny_vit.layout(site)
    assert nearest in caught.value.fix or not site
    with pytest.raises(ModelError, match="3 blocks, numbered from 0"):
        tiny_vit.trace(images(tiny_vit), [site])


def test_a_site_that_an_architecture_lacks_is_refused(architecture):
    with pytest.raises(ModelError, match="has no site attention@0"):
        architecture("vit_base_patch16_xp_224").layout("attention@0")


@pytest.mark.parametrize(
    ("site", "reason"),
    [
        ("blocks.0.attn.qkv", None),
        ("blocks.0.attn.q_norm", r"gives a tensor of shape \(1, 2, 19, 16\)"),
        ("fc_norm", "gives a tensor of shape"),
        ("patch_drop", None),
        ("head", "gives a tensor of shape"),
    ],
)
def test_a_module_without_tokens_is_refused(tiny_vit, site, reason):
    if reason is None:
        assert tiny_vit.layout(site).n_tokens == 19
    else:
        with pytest.raises(ModelError, match=f"{reason}.*Choose a site"):
            tiny_vit.layout(site)


class Odd(torch.nn.Module):
    """A network with modules that give a tuple, run twice, never run, or give windows."""

    num_classes = 0

    def __init__(self):
        super().__init__()
        self.pair = torch.nn.MultiheadAttention(4, 1, batch_first=True)
        self.twice = torch.nn.Linear(4, 4)
        self.never = torch.nn.Linear(4, 4)
        self.windows = torch.nn.Identity()

    def forward_features(self, pixels):
        tokens = pixels.flatten(2).mT.repeat(1, 1, 2)[:, :, :4]
        tokens = self.twice(self.twice(self.pair(tokens, tokens, tokens)[0]))
        return self.windows(tokens.reshape(-1, 4, 4)).reshape(tokens.shape)


@pytest.mark.parametrize(
    ("site", "reason"),
    [
        ("pair", "pair gives a tuple"),
        ("twice", "twice runs more than once"),
        ("never", "never does not run"),
        ("windows", r"gives a tensor of shape \(4, 4, 4\) for one image"),
    ],
)
def test_a_module_that_is_no_site_is_refused(site, reason):
    model = wrap(Odd(), (4, 4))
    with pytest.raises(ModelError, match=reason):
        model.layout(site)


@pytest.mark.parametrize(
    ("size", "covered"), [((32, 32), None), ((37, 32), (32, 32)), ((39, 46), (32, 40))]
)
def test_pixels_that_no_patch_sees_are_known(make_vit, size, covered):
    """A change of them changes no token, and one of any other pixel does."""
    model = make_vit(img_size=size)
    layout = model.layout("residual@1")
    assert layout.covered == covered
    height, width = covered or size
    assert layout.grid == (height // 8, width // 8)
    plain = torch.zeros(1, 3, *size)
    outside, inside = plain.clone(), plain.clone()
    outside[..., height:, :] = outside[..., :, width:] = 9.0
    inside[..., height - 1, width - 1] = 9.0
    before, *after = (
        model.tokens(pixels, ["residual@1"])["residual@1"] for pixels in (plain, outside, inside)
    )
    assert torch.equal(after[0], before)
    assert not torch.equal(after[1], before)


def test_tokens_without_a_known_grid_are_refused():
    class NoGrid(Odd):
        def forward_features(self, pixels):
            return self.never(pixels.flatten(2).mT.repeat(1, 1, 2)[:, :, :4])

    with pytest.raises(ModelError, match="Cannot tell the patch grid: 16 tokens at 4 × 4 pixels"):
        wrap(NoGrid(), (4, 4)).layout("never")


def test_a_model_without_a_head_has_no_logits(make_vit):
    model = make_vit(num_classes=0)
    output = model.trace(images(model), ["residual@0"]).output
    assert output.logits is None
    assert output.tokens.shape == (3, 17, 32)


def test_the_model_is_frozen(make_vit):
    model = make_vit(proj_drop_rate=0.5)
    assert not any(parameter.requires_grad for parameter in model.architecture.network.parameters())
    pixels = images(model)
    first, second = (model.trace(pixels, ["mlp@1"]).tokens["mlp@1"] for _ in range(2))
    assert torch.equal(first, second)


def test_the_identity_tells_one_changed_weight(make_vit):
    first, same, other = make_vit().identity, make_vit().identity, make_vit(seed=1).identity
    assert first.same_weights(same)
    assert not first.same_weights(other)
    network = make_vit().architecture.network
    network.blocks[1].mlp.fc1.weight[3, 4] += 1e-6
    changed = wrap(network, (32, 32)).identity
    assert not first.same_weights(changed)


def test_the_preprocessing_is_that_of_the_data_config(tiny_vit):
    preprocessing = tiny_vit.preprocessing
    assert preprocessing.size == (32, 32)
    assert (preprocessing.crop_share, preprocessing.crop) == (0.9, "center")
    assert (preprocessing.mean, preprocessing.std) == ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


@pytest.mark.parametrize("change", [{"crop_mode": "border"}, {"interpolation": "random"}])
def test_an_unsupported_preprocessing_is_refused(change):
    with pytest.raises(ModelError, match="preprocessing of timm/x is not supported"):
        wrap(Eva(**VIT), (32, 32), **change)
