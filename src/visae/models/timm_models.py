"""Every timm model as a ``VisionModel``, by plain forward hooks.

Plain ViTs are resumed by running only the blocks after the site. Any other architecture is
resumed by running it whole from the pixels with the site's output replaced, which is exact too.
"""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple, cast, get_args

import torch
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from visae.errors import ModelError, nearest_names
from visae.models.config import ModelIdentity
from visae.models.hooks import capture_input, capture_output, replace_output
from visae.models.layout import Layout
from visae.models.preprocessing import Interpolation, Preprocessing
from visae.models.protocol import Output, Trace
from visae.models.shapes import Form, SiteShape, flatten, map_form
from visae.storage.hashing import hash_tensors

__all__ = ["TimmModel"]

_KINDS = ("residual", "mlp", "attention")
_PARTS = {"mlp": ("drop_path2", "ls2", "mlp"), "attention": ("drop_path1", "ls1", "attn")}


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
        self._network = network.eval().requires_grad_(False)
        self._identity = ModelIdentity(
            name=name, title=title, weights_sha256=hash_tensors(network.state_dict())
        )
        self._preprocessing = _preprocessing(data_config, name)
        self._shapes: dict[str, SiteShape] = {}

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
        """Those of residual, mlp and attention that each block has; else the model's stages."""
        blocks = self._blocks()
        if not blocks:
            features = getattr(self._network, "feature_info", None) or []
            return tuple(str(info["module"]) for info in features)
        return tuple(
            f"{kind}@{index}"
            for index, block in enumerate(blocks)
            for kind in _KINDS
            if _part(block, kind) is not None
        )

    def layout(self, site: str) -> Layout:
        """Token layout at a site, found by one pass over a blank image."""
        return self._shape(site).layout

    def d_model(self, site: str) -> int:
        """Width of the activations at a site."""
        return self._shape(site).d_model

    @torch.no_grad()
    def trace(self, pixels: Float[Tensor, "image 3 height width"], sites: Sequence[str]) -> Trace:
        """Activations at some sites and the output, from one forward pass.

        Raises:
            ModelError: when there is no such site, or it does not give one tensor a pass.
        """
        places = {site: self._place(site) for site in sites}
        forms = {site: self._shape(site).form for site in sites}
        raw: dict[str, Tensor] = {}
        entry: dict[str, Tensor] = {}
        pixels = pixels.to(self._device())
        with contextlib.ExitStack() as hooks:
            for site, place in places.items():
                hooks.enter_context(capture_output(place.module, raw, site))
                if self._resumes_from_block(place) and not place.is_residual:
                    block = self._blocks()[cast(int, place.block)]
                    hooks.enter_context(capture_input(block, entry, site))
            output = self._forward(pixels)
        tokens = {site: flatten(raw[site], forms[site]) for site in sites}
        for site, place in places.items():
            if place.is_residual and self._resumes_from_block(place):
                entry[site] = raw[site]
            elif not self._resumes_from_block(place):
                entry[site] = pixels
        return Trace(tokens=tokens, entry=entry, output=output)

    @torch.no_grad()
    def resume(
        self, trace: Trace, site: str, tokens: Float[Tensor, "image token d_model"]
    ) -> Output:
        """The output when the activations at ``site`` are ``tokens``.

        Raises:
            ModelError: when the tokens have another shape than those of the trace.
        """
        place, shape = self._place(site), self._shape(site)
        entry = trace.entry[site]
        wanted = (entry.shape[0], shape.layout.n_tokens, shape.d_model)
        if tokens.shape != wanted:
            raise ModelError(
                f"The tokens have shape {tuple(tokens.shape)} instead of {wanted}",
                where=f"{self._identity.name}, {site}",
                fix="Give one activation for each token of each image of the trace",
            )
        tokens = tokens.to(entry.device)
        if not self._resumes_from_block(place):
            with replace_output(place.module, lambda old: shape.unflatten(tokens, old)):
                return self._forward(entry)
        index = cast(int, place.block)
        if place.is_residual:
            return self._suffix(index + 1, tokens)
        with replace_output(place.module, lambda _: tokens):
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
        form: Form = "tokens" if features.ndim == 3 else self._usual_form()
        return Output(tokens=flatten(features, form), logits=logits)

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

    def _usual_form(self) -> Form:
        """Where this architecture has the channels of its feature maps."""
        last = str(getattr(self._network, "output_fmt", "NCHW")).endswith("NHWC")
        return "channels last" if last else "channels first"

    def _place(self, site: str) -> _Place:
        kind, mark, number = site.partition("@")
        blocks = self._blocks()
        index = _index(number)
        if mark and kind in _KINDS and index is not None and index < len(blocks):
            part = _part(blocks[index], kind)
            if part is not None:
                return _Place(part, index, kind == "residual")
        modules = dict(self._network.named_modules())
        if site and site in modules:
            return _Place(modules[site], None, False)
        raise ModelError(
            f"{self._identity.name} has no site {site}",
            where=f"it has {len(blocks)} blocks, numbered from 0",
            fix=f"Use one of: {nearest_names(site, (*self.sites, *filter(None, modules)))}",
        )

    def _shape(self, site: str) -> SiteShape:
        if site not in self._shapes:
            self._shapes[site] = self._measure(site)
        return self._shapes[site]

    @torch.no_grad()
    def _measure(self, site: str) -> SiteShape:
        """Run a blank image through the network and look at what the site gives."""
        place = self._place(site)
        raw: dict[str, Tensor] = {}
        size = self._preprocessing.size
        blank = torch.zeros(1, 3, *size, device=self._device())
        with capture_output(place.module, raw, site):
            self._forward(blank)
        shape = tuple(raw[site].shape)
        if len(shape) == 3 and shape[0] == 1:
            return SiteShape(self._token_layout(shape[1], site), shape[2], "tokens")
        form = map_form(shape, size, self._usual_form()) if len(shape) == 4 else None
        if form is None or shape[0] != 1:
            raise ModelError(
                f"This site gives a tensor of shape {shape} for one image",
                where=f"{self._identity.name}, {site}",
                fix="Choose a site that gives tokens or a feature map",
            )
        rows, columns, width = shape[1:] if form == "channels last" else (*shape[2:], shape[1])
        return SiteShape(Layout(special=(), grid=(rows, columns)), width, form)

    def _token_layout(self, n_tokens: int, site: str) -> Layout:
        special = self._special_tokens()
        for names in (special, ()):
            if grid := self._grid(n_tokens - len(names)):
                return Layout(special=names, grid=grid)
        height, width = self._preprocessing.size
        raise ModelError(
            f"Cannot tell the patch grid: {n_tokens} tokens at {height} × {width} pixels",
            where=f"{self._identity.name}, {site}",
            fix="Choose a site whose tokens lie on the model's patch grid",
        )

    def _special_tokens(self) -> tuple[str, ...]:
        """The names of the special tokens: those with a parameter of their own, then registers."""
        n_special = int(getattr(self._network, "num_prefix_tokens", 0))
        known = {"cls": "cls_token", "distillation": "dist_token"}
        named = [n for n, part in known.items() if getattr(self._network, part, None) is not None]
        named = named[:n_special]
        return (*named, *(f"register{index}" for index in range(n_special - len(named))))

    def _grid(self, n_patches: int) -> tuple[int, int] | None:
        """The patch grid of so many patches, or None where the network has no such grid."""
        named = (getattr(self._network, name, None) for name in ("patch_embed", "stem"))
        embed = next((part for part in named if part is not None), None)
        height, width = self._preprocessing.size
        patch = getattr(embed, "patch_size", None) or (height + 1, width + 1)
        known = getattr(embed, "grid_size", None) or (0, 0)
        for rows, columns in ((height // patch[0], width // patch[1]), known):
            if rows * columns == n_patches > 0:
                return int(rows), int(columns)
        return None


def _preprocessing(data_config: dict[str, Any], name: str) -> Preprocessing:
    """The preprocessing that timm's data configuration describes."""
    crop, interpolation = data_config["crop_mode"], data_config["interpolation"]
    if crop not in ("center", "squash") or interpolation not in get_args(Interpolation):
        raise ModelError(
            f"The preprocessing of {name} is not supported",
            where=f"crop mode {crop}, interpolation {interpolation}",
            fix="Choose a model that crops at the centre or squashes its images",
        )
    return Preprocessing(
        size=tuple(data_config["input_size"][1:]),
        crop_share=float(data_config["crop_pct"]),
        crop=crop,
        interpolation=interpolation,
        mean=tuple(data_config["mean"]),
        std=tuple(data_config["std"]),
    )


def _index(number: str) -> int | None:
    """The block that a site's number means; None unless it is written plainly."""
    plain = number.isascii() and number.isdecimal() and number == str(int(number))
    return int(number) if plain else None


def _part(block: nn.Module, kind: str) -> nn.Module | None:
    """The module whose output is a block's residual, mlp or attention activation, if it has one.

    The mlp and attention activations are what the block adds to the residual stream: what comes
    out of the module before the sum, after LayerScale and post-norm where a block has them.
    """
    if kind == "residual":
        return block
    if not isinstance(getattr(block, _PARTS[kind][-1], None), nn.Module):
        return None
    return next(
        part for name in _PARTS[kind] if isinstance(part := getattr(block, name, None), nn.Module)
    )
