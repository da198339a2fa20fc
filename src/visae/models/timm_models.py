"""Every timm model as a ``VisionModel``, by plain forward hooks.

Plain ViTs are resumed by running only the blocks after the site. Any other architecture is
resumed by running it whole from the pixels with the site's output replaced, which is exact too.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from visae.errors import ModelError, nearest_names
from visae.models.config import ModelIdentity
from visae.models.layout import Layout
from visae.models.preprocessing import Preprocessing
from visae.models.protocol import Output, Trace
from visae.storage.hashing import hash_tensors

__all__ = ["TimmModel"]


class _Place(NamedTuple):
    """Where a site is in the network."""

    module: nn.Module
    block: int | None  # index of the block that holds it, None for a module path
    is_residual: bool


class TimmModel:
    """A frozen timm network; ``visae.models.loading.load_model`` makes one."""

    def __init__(
        self, network: nn.Module, *, name: str, title: str, data_config: dict[str, Any]
    ) -> None:
        self._network = network
        self._identity = ModelIdentity(
            name=name, title=title, weights_sha256=hash_tensors(network.state_dict())
        )
        self._preprocessing = Preprocessing(
            size=tuple(data_config["input_size"][1:]),
            crop_share=float(data_config["crop_pct"]),
            crop=data_config["crop_mode"],
            interpolation=data_config["interpolation"],
            mean=tuple(data_config["mean"]),
            std=tuple(data_config["std"]),
        )
        self._shapes: dict[str, tuple[Layout, int]] = {}

    @property
    def identity(self) -> ModelIdentity:
        """Name, title and weight hash."""
        return self._identity

    @property
    def preprocessing(self) -> Preprocessing:
        """How images become its input."""
        return self._preprocessing

    @property
    def sites(self) -> Sequence[str]:
        """Residual, mlp and attention sites of each block; stages of a model without blocks."""
        blocks = self._blocks()
        if not blocks:
            features = getattr(self._network, "feature_info", None) or []
            return tuple(str(info["module"]) for info in features)
        kinds = ("residual", "mlp", "attention")
        return tuple(f"{kind}@{index}" for index in range(len(blocks)) for kind in kinds)

    def layout(self, site: str) -> Layout:
        """Token layout at a site, found by one pass over a blank image."""
        return self._shape(site)[0]

    def d_model(self, site: str) -> int:
        """Width of the activations at a site."""
        return self._shape(site)[1]

    @torch.inference_mode()
    def trace(self, pixels: Float[Tensor, "image 3 height width"], sites: Sequence[str]) -> Trace:
        """Activations at some sites and the output, from one forward pass."""
        places = {site: self._place(site) for site in sites}
        raw: dict[str, Tensor] = {}
        entry: dict[str, Tensor] = {}
        pixels = pixels.to(self._device())
        with contextlib.ExitStack() as hooks:
            for site, place in places.items():
                hooks.enter_context(_capture_output(place.module, raw, site))
                if self._resumes_from_block(place) and not place.is_residual:
                    block = self._blocks()[cast(int, place.block)]
                    hooks.enter_context(_capture_input(block, entry, site))
            output = self._forward(pixels)
        tokens = {site: self._flatten(raw[site]) for site in sites}
        for site, place in places.items():
            if place.is_residual and self._resumes_from_block(place):
                entry[site] = raw[site]
            elif not self._resumes_from_block(place):
                entry[site] = pixels
        return Trace(tokens=tokens, entry=entry, output=output)

    @torch.inference_mode()
    def resume(
        self, trace: Trace, site: str, tokens: Float[Tensor, "image token d_model"]
    ) -> Output:
        """The output when the activations at ``site`` are ``tokens``."""
        place = self._place(site)
        entry = trace.entry[site]
        tokens = tokens.to(entry.device)
        if not self._resumes_from_block(place):
            with _replace_output(place.module, lambda old: self._unflatten(tokens, old)):
                return self._forward(entry)
        index = cast(int, place.block)
        if place.is_residual:
            return self._suffix(index + 1, tokens)
        with _replace_output(place.module, lambda _: tokens):
            return self._suffix(index, entry)

    def _suffix(self, start: int, tokens: Tensor) -> Output:
        """Blocks from ``start`` on, the last norm and the head of a plain ViT."""
        network = cast(VisionTransformer, self._network)
        for block in list(network.blocks)[start:]:
            tokens = block(tokens)
        return self._finish(network.norm(tokens))

    def _forward(self, pixels: Tensor) -> Output:
        return self._finish(cast(Any, self._network).forward_features(pixels))

    def _finish(self, features: Tensor) -> Output:
        network = cast(Any, self._network)
        has_head = getattr(network, "num_classes", 0) > 0
        logits = network.forward_head(features) if has_head else None
        return Output(tokens=self._flatten(features), logits=logits)

    def _device(self) -> torch.device:
        return next(self._network.parameters()).device

    def _blocks(self) -> list[nn.Module]:
        return list(cast(Any, getattr(self._network, "blocks", [])))

    def _resumes_from_block(self, place: _Place) -> bool:
        """Whether the network after a block is: the later blocks, the norm, the head."""
        plain = (
            cast(Any, type(self._network)).forward_features is VisionTransformer.forward_features
        )
        return plain and place.block is not None

    def _channels_last(self) -> bool:
        return str(getattr(self._network, "output_fmt", "NCHW")).endswith("NHWC")

    def _flatten(self, features: Tensor) -> Tensor:
        """(image, token, d_model) from tokens or from a feature map."""
        if features.ndim == 3:
            return features
        if features.ndim == 4 and self._channels_last():
            return features.flatten(1, 2)
        if features.ndim == 4:
            return features.flatten(2).transpose(1, 2)
        raise ModelError(
            f"This site gives a tensor of shape {tuple(features.shape)}",
            where=self._identity.name,
            fix="Choose a site that gives tokens or a feature map",
        )

    def _unflatten(self, tokens: Tensor, old: Tensor) -> Tensor:
        if old.ndim == 3:
            return tokens
        if self._channels_last():
            return tokens.reshape(old.shape)
        return tokens.transpose(1, 2).reshape(old.shape)

    def _place(self, site: str) -> _Place:
        kind, _, index = site.partition("@")
        blocks = self._blocks()
        if kind in ("residual", "mlp", "attention") and index.isdigit():
            if int(index) < len(blocks):
                return _Place(_part(blocks[int(index)], kind), int(index), kind == "residual")
        elif not index and site in dict(self._network.named_modules()) and site:
            return _Place(self._network.get_submodule(site), None, False)
        raise ModelError(
            f"{self._identity.name} has no site {site}",
            where=f"it has {len(blocks)} blocks, numbered from 0",
            fix=f"Use a module path or one of: {nearest_names(site, self.sites)}",
        )

    def _shape(self, site: str) -> tuple[Layout, int]:
        if site not in self._shapes:
            self._shapes[site] = self._measure(site)
        return self._shapes[site]

    @torch.inference_mode()
    def _measure(self, site: str) -> tuple[Layout, int]:
        """Run a blank image through the network and look at what the site gives."""
        place = self._place(site)
        raw: dict[str, Tensor] = {}
        blank = torch.zeros(1, 3, *self._preprocessing.size, device=self._device())
        with _capture_output(place.module, raw, site):
            self._forward(blank)
        features = raw[site]
        tokens = self._flatten(features)
        if features.ndim == 4:
            height, width = features.shape[1:3] if self._channels_last() else features.shape[2:]
            return Layout(special=(), grid=(height, width)), tokens.shape[2]
        special = self._special_tokens()
        grid = self._grid(tokens.shape[1] - len(special), site)
        return Layout(special=special, grid=grid), tokens.shape[2]

    def _special_tokens(self) -> tuple[str, ...]:
        n_special = int(getattr(self._network, "num_prefix_tokens", 0))
        has_cls = getattr(self._network, "cls_token", None) is not None and n_special > 0
        n_registers = n_special - has_cls
        return ("cls",) * has_cls + tuple(f"register{index}" for index in range(n_registers))

    def _grid(self, n_patches: int, site: str) -> tuple[int, int]:
        embed = getattr(self._network, "patch_embed", None)
        height, width = self._preprocessing.size
        patch = getattr(embed, "patch_size", None)
        if patch is not None and (height // patch[0]) * (width // patch[1]) == n_patches:
            return height // patch[0], width // patch[1]
        raise ModelError(
            f"Cannot tell the patch grid: {n_patches} patches at {height} × {width} pixels",
            where=f"{self._identity.name}, {site}",
            fix="Choose a site whose tokens lie on the model's patch grid",
        )


def _part(block: nn.Module, kind: str) -> nn.Module:
    """The module whose output is a block's residual, mlp or attention activation.

    The mlp and attention activations are what the block adds to the residual stream, so they are
    taken after LayerScale where a block has it.
    """
    if kind == "residual":
        return block
    for name in ("ls2", "mlp") if kind == "mlp" else ("ls1", "attn"):
        if isinstance(part := getattr(block, name, None), nn.Module):
            return part
    raise ModelError(
        f"The blocks of this model have no {kind} site",
        where=type(block).__name__,
        fix="Use residual or a module path",
    )


@contextlib.contextmanager
def _capture_output(module: nn.Module, into: dict[str, Tensor], key: str) -> Iterator[None]:
    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        into[key] = output

    handle = module.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _capture_input(module: nn.Module, into: dict[str, Tensor], key: str) -> Iterator[None]:
    def keep(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        into[key] = inputs[0]

    handle = module.register_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _replace_output(module: nn.Module, replacement: Any) -> Iterator[None]:
    handle = module.register_forward_hook(lambda _module, _inputs, output: replacement(output))
    try:
        yield
    finally:
        handle.remove()
