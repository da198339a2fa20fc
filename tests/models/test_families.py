"""One small representative of every timm family: tokens, edits, resuming, layout."""

import contextlib
import dataclasses

import pytest
import timm
import torch

from visae.errors import ModelError
from visae.models.layout import Layout
from visae.models.timm_models import timm_model

SIZE = (48, 64)
WIDTHS = {"embed_dim": 32, "depth": 3, "num_heads": 2}
VIT = {"img_size": SIZE, "patch_size": 16, "num_classes": 4, **WIDTHS}
CAIT = "cait_xxs24_224"  # multiplies by LayerScale after its modules
MAP = {"num_classes": 4}
WINDOWS = {
    "img_size": (64, 96),
    "window_size": 4,
    "embed_dim": 16,
    "depths": (1, 1, 2, 1),
    "num_heads": (1, 1, 2, 2),
}
CLS = ("cls",)
FOUR_REGISTERS = tuple(f"register{index}" for index in range(4))


@dataclasses.dataclass
class Family:
    """A representative: its timm name, options, input size, and what its layout must be."""

    name: str
    special: tuple[str, ...] = ()
    options: dict = dataclasses.field(default_factory=lambda: VIT)
    size: tuple[int, int] = SIZE
    site: str = "residual@0"
    grid: tuple[int, int] = (3, 4)
    reach: int = 0  # how many patches away a patch's own pixels may tell most


BLOCKS = {
    "ViT": Family("vit_base_patch16_224", CLS),
    "MAE": Family("vit_base_patch16_224.mae", CLS),
    "I-JEPA": Family("vit_huge_patch14_gap_224.in22k_ijepa"),
    "DeiT": Family("deit_tiny_distilled_patch16_224", ("cls", "distillation")),
    "DeiT III": Family("deit3_small_patch16_224", CLS),
    "DINOv2": Family("vit_small_patch14_dinov2", CLS),
    "DINOv2 with registers": Family("vit_small_patch14_reg4_dinov2", CLS + FOUR_REGISTERS),
    "DINOv3": Family("vit_small_patch16_dinov3", CLS + FOUR_REGISTERS),
    "CLIP": Family("vit_base_patch16_clip_quickgelu_224", CLS),
    "SigLIP": Family("vit_base_patch16_siglip_224"),
    "SigLIP 2": Family("vit_base_patch16_siglip_gap_224.v2_webli"),
    "NaFlex SigLIP 2": Family("naflexvit_base_patch16_siglip"),
    "NaFlex": Family("naflexvit_base_patch16_gap", FOUR_REGISTERS),
    "EVA": Family("eva_large_patch14_196", CLS),
    "EVA-02": Family("eva02_tiny_patch14_224", CLS),
    "EVA-02 CLIP": Family("eva02_base_patch16_clip_224", CLS),
    "PE core": Family("vit_pe_core_tiny_patch16_384", CLS),
    "PE spatial": Family("vit_pe_spatial_tiny_patch16_512", CLS),
    "PE lang": Family("vit_pe_lang_large_patch14_448", CLS),
    "BEiT": Family("beit_base_patch16_224", CLS),
    "BEiT v2": Family("beitv2_base_patch16_224", CLS),
    "AIMv2": Family("aimv2_large_patch14_224"),
    "ViT SO150M": Family("vit_so150m2_patch16_reg1_gap_256", ("register0",)),
    "relative positions": Family("vit_relpos_small_patch16_224"),
    "rotary": Family("vit_betwixt_patch16_rope_reg4_gap_256", FOUR_REGISTERS),
    "rotary, mixed": Family("vit_small_patch16_rope_mixed_224", CLS),
    "CaiT": Family(CAIT),
    "XCiT": Family("xcit_nano_12_p16_224", (), {"img_size": SIZE, **MAP, **WIDTHS}, reach=1),
    "Qwen 3": Family("qwen3_vit_88m"),
    "DeepSeek": Family("deepseek_vit_412m"),
    "Gemma 4": Family("gemma4_vit_167m"),
    "SAM": Family("samvit_base_patch16_224"),
}
STAGES = {
    "Swin": Family(
        "swin_tiny_patch4_window7_224", (), WINDOWS | MAP, (64, 96), "layers.0", (16, 24)
    ),
    "Swin V2": Family("swinv2_tiny_window8_256", (), WINDOWS | MAP, (64, 96), "layers.1", (8, 12)),
    "MViT v2": Family("mvitv2_tiny", (), {"img_size": 64, **MAP}, (64, 64), "stages.0", (16, 16)),
    "LeViT": Family("levit_128s", (), MAP, (224, 224), "stages.0", (14, 14), reach=1),
    "ConvNeXt": Family(
        "convnext_atto",
        (),
        {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), **MAP},
        (64, 96),
        "stages.1",
        (8, 12),
        reach=1,
    ),
    "ConvNeXt V2": Family(
        "convnextv2_atto",
        (),
        {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), **MAP},
        (64, 96),
        "stages.0",
        (16, 24),
        reach=1,
    ),
    "ResNet": Family(
        "resnet10t", (), {"channels": (8, 8, 16, 16), **MAP}, (64, 96), "layer2", (8, 12), reach=1
    ),
    "EfficientNet": Family("efficientnet_b0", (), MAP, (64, 96), "blocks.2", (8, 12), reach=1),
    "MobileNet V3": Family(
        "mobilenetv3_small_050", (), MAP, (64, 96), "blocks.1.1", (8, 12), reach=1
    ),
    "RegNet": Family("regnetx_002", (), MAP, (64, 96), "s1", (16, 24), reach=1),
    "PVT v2": Family("pvt_v2_b0", (), MAP, (64, 96), "stages.0", (16, 24), reach=2),
    "FastViT": Family("fastvit_t8", (), MAP, (64, 96), "stages.0", (16, 24), reach=1),
}


def build(family):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = timm.create_model(family.name, pretrained=False, **family.options)
        for name, parameter in network.named_parameters():
            if "gamma" in name:  # LayerScale starts near 0, and hides what a block does
                torch.nn.init.constant_(parameter, 0.5)
    data_config = {"input_size": (3, *family.size), "crop_pct": 0.9, "crop_mode": "center"}
    channels = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    data_config |= {"interpolation": "bicubic", **channels}
    return timm_model(network, name=f"timm/{family.name}", title="X", data_config=data_config)


@pytest.fixture(scope="module")
def model_of():
    made = {}

    def make(family):
        if family.name not in made:
            made[family.name] = build(family)
        return made[family.name]

    return make


def images(model, n=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, *model.preprocessing.size, generator=generator)


def noise(like, seed=1):
    return 3 * torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


def named_like(families):
    return pytest.mark.parametrize("family", [pytest.param(f, id=n) for n, f in families.items()])


def without(families, *names):
    return {name: family for name, family in families.items() if name not in names}


@contextlib.contextmanager
def replaced(network, site, tokens):
    """The naive edit: one hook on the module that a site means."""
    kind, _, index = site.partition("@")
    if kind == "residual":
        module = network.blocks[int(index)]
    elif kind == "heads":
        module = network.blocks[int(index)].attn.proj
    else:
        number = "2" if kind == "mlp" else "1"
        module = getattr(network.blocks[int(index)], f"drop_path{number}")
    if kind == "heads":
        hook = module.register_forward_pre_hook(lambda *_: (tokens,))
    else:
        hook = module.register_forward_hook(lambda *_: tokens)
    try:
        yield
    finally:
        hook.remove()


def sites_to_check(model):
    """All sites of the first and last block, or three stages."""
    sites = model.sites
    if "@" not in sites[0]:
        return sites[:3]
    last = max(int(site.partition("@")[2]) for site in sites)
    return tuple(site for site in sites if site.partition("@")[2] in ("0", str(last)))


@named_like(BLOCKS | STAGES)
def test_resuming_with_the_tokens_is_the_plain_pass_bit_for_bit(model_of, family):
    model = model_of(family)
    pixels, network = images(model), model.architecture.network
    with torch.no_grad():
        whole = network(pixels)
    sites = sites_to_check(model)
    trace = model.trace(pixels, sites)
    assert torch.equal(trace.output.logits, whole)
    for site in sites:
        assert trace.tokens[site].shape == (2, model.layout(site).n_tokens, model.d_model(site))
        same = model.resume(trace, site, trace.tokens[site])
        assert torch.equal(same.logits, whole), site
        assert torch.equal(same.tokens, trace.output.tokens), site


@named_like(BLOCKS | STAGES)
def test_tokens_are_those_of_the_whole_pass_in_any_order(model_of, family):
    model = model_of(family)
    pixels, sites = images(model), sites_to_check(model)
    trace = model.trace(pixels, sites)
    together = model.tokens(pixels, sites[::-1])
    assert list(together) == list(sites[::-1])
    for site in sites:
        assert torch.equal(together[site], trace.tokens[site])
    assert torch.equal(model.tokens(pixels, sites[:1])[sites[0]], trace.tokens[sites[0]])


@named_like(without(BLOCKS, "SAM", "Gemma 4"))  # a map in the network; other names of parts
def test_an_edit_is_what_a_hook_on_the_module_does(model_of, family):
    model = model_of(family)
    pixels, network = images(model), model.architecture.network
    owner = getattr(network, "encoder", network)
    sites = sites_to_check(model)
    kinds = {site.partition("@")[0] for site in sites}
    assert kinds == {"residual", "heads"} | (set() if family.name == CAIT else {"mlp", "attention"})
    trace = model.trace(pixels, sites)
    for site in sites:
        tokens = trace.tokens[site] + noise(trace.tokens[site])
        with torch.no_grad(), replaced(owner, site, tokens):
            wanted = network(pixels)
        got = model.resume(trace, site, tokens).logits
        assert torch.equal(got, wanted), site
        assert not torch.equal(got, trace.output.logits), site


@named_like(without(BLOCKS, "SAM", "CaiT", "XCiT"))  # XCiT adds a third part
def test_mlp_and_attention_are_what_a_block_adds(model_of, family):
    model = model_of(family)
    sites = ["residual@0", "attention@1", "mlp@1", "residual@1"]
    before, attention, mlp, after = model.tokens(images(model), sites).values()
    torch.testing.assert_close(before + attention + mlp, after)


@named_like(STAGES)
def test_an_edit_of_a_stage_changes_the_output(model_of, family):
    model = model_of(family)
    trace = model.trace(images(model), [family.site])
    tokens = trace.tokens[family.site]
    edited = model.resume(trace, family.site, tokens + noise(tokens))
    assert not torch.equal(edited.logits, trace.output.logits)


@named_like(BLOCKS | STAGES)
def test_the_layout_names_the_tokens(model_of, family):
    """Pixels of one patch tell that patch's token most; special tokens come before."""
    model = model_of(family)
    layout = model.layout(family.site)
    assert layout == Layout(special=family.special, grid=family.grid)
    row, column = family.grid[0] - 1, family.grid[1] - 2
    pixels = images(model, 1)
    before = model.tokens(pixels, [family.site])[family.site]
    rows, columns = (side // n for side, n in zip(family.size, family.grid, strict=True))
    pixels[:, :, row * rows : (row + 1) * rows, column * columns : (column + 1) * columns] += 2
    change = (model.tokens(pixels, [family.site])[family.site] - before).norm(dim=2)[0]
    found = divmod(int(change[layout.n_special :].argmax()), family.grid[1])
    assert max(abs(found[0] - row), abs(found[1] - column)) <= family.reach
    assert (change[: layout.n_special] < change.max() / 2).all()


@pytest.mark.parametrize("size", [(32, 96), (80, 48)])
@pytest.mark.parametrize("name", ["ViT", "DINOv3", "EVA-02", "BEiT", "NaFlex"])
def test_another_image_size_has_another_grid(name, size):
    family = dataclasses.replace(
        BLOCKS[name],
        options=VIT | {"img_size": size},
        size=size,
        grid=(size[0] // 16, size[1] // 16),
    )
    model = build(family)
    assert model.layout("residual@1") == Layout(special=family.special, grid=family.grid)
    trace = model.trace(images(model), ["mlp@1"])
    same = model.resume(trace, "mlp@1", trace.tokens["mlp@1"])
    assert torch.equal(same.logits, trace.output.logits)


@pytest.mark.parametrize("name", ["SigLIP", "I-JEPA"])
def test_a_model_without_special_tokens_has_no_cls(model_of, name):
    layout = model_of(BLOCKS[name]).layout("residual@0")
    with pytest.raises(ModelError, match=r"This model has no special tokens.*Keep patches"):
        layout.kept("special")
    with pytest.raises(ModelError, match=r"has no cls token.*Use patches"):
        layout.special_index("cls")


def test_windows_of_attention_are_not_listed_as_sites(model_of):
    model = model_of(BLOCKS["SAM"])
    assert model.sites[:2] == ("residual@0", "mlp@0")
    with pytest.raises(ModelError, match="gives a tensor of shape"):
        model.layout("attention@0")


@pytest.mark.parametrize("site", ["attention@0", "blocks.0.attn", "heads@0"])
def test_a_padded_window_is_not_taken_for_the_image(site):
    """A square image smaller than a window of 14 × 14 patches is padded to one window."""
    model = build(Family("samvit_base_patch16_224", (), VIT | {"img_size": (48, 48)}, (48, 48)))
    assert model.layout("residual@0").grid == (3, 3)
    assert not {"attention@0", "heads@0"} & set(model.sites)
    with pytest.raises(ModelError, match=r"a map of \(14, 14\) and its block one of|196 tokens at"):
        model.layout(site)


def test_tokens_in_an_order_of_their_own_are_refused():
    """Hiera keeps the patches of a mask unit together: not row by row."""
    options = {"img_size": (64, 96), "embed_dim": 16, "stages": (1, 1, 1, 1), "num_heads": 1}
    model = build(Family("hiera_tiny_224", (), options | MAP, (64, 96)))
    assert model.sites == ()
    with pytest.raises(ModelError, match="Cannot tell the patch grid: 384 tokens"):
        model.layout("residual@0")


def test_a_network_of_several_streams_is_refused():
    model = build(Family("crossvit_tiny_240", (), MAP, (240, 240)))
    with pytest.raises(ModelError, match="gives a list of features, not one tensor"):
        model.layout("blocks.0")
