"""Any frozen network as a ``VisionModel``, by plain forward hooks.

What differs between networks is in their ``Architecture``; this file reads, replaces and resumes.
A network whose blocks form a chain is resumed from the block that holds the site; any other is
run whole from the pixels with the site's part replaced, which is exact too.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visae.errors import ModelError
from visae.models.architecture import Architecture
from visae.models.chain import Chain
from visae.models.config import ModelIdentity
from visae.models.hooks import reading, rewriting
from visae.models.layout import Layout
from visae.models.measuring import site_shape
from visae.models.places import Place, find_place, named_sites
from visae.models.preprocessing import Preprocessing
from visae.models.protocol import Output, Trace
from visae.models.shapes import SiteShape, flatten
from visae.storage.hashing import hash_tensors
from visae.storage.hub import first_lines

__all__ = ["HookedModel", "identify"]


class HookedModel:
    """A frozen network, on the device where its weights are; adapters make them.

    Sites are those of ``sites``, single heads (``heads@9.3``), and module paths. One pass runs at
    a time, whatever the number of threads that ask.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        identity: ModelIdentity,
        preprocessing: Preprocessing,
    ) -> None:
        architecture.network.eval().requires_grad_(False)
        self._architecture = architecture
        self._identity = identity
        self._preprocessing = preprocessing
        self._chain = Chain(architecture, preprocessing.size)
        self._places: dict[str, Place] = {}
        self._shapes: dict[str, SiteShape] = {}
        self._lock = threading.RLock()

    @property
    def architecture(self) -> Architecture:
        """The network, and which of its modules are what."""
        return self._architecture

    @property
    def identity(self) -> ModelIdentity:
        """Name, title and weight hash."""
        return self._identity

    @property
    def preprocessing(self) -> Preprocessing:
        """How images become its input."""
        return self._preprocessing

    @functools.cached_property
    def sites(self) -> Sequence[str]:
        """What gives tokens: parts of its blocks, or else its stages; found by one blank pass."""
        of_blocks, stages = named_sites(self._architecture)
        observed = self._observe((*of_blocks, *stages))
        working = [site for site in observed if self._gives_tokens(site, observed[site])]
        return tuple(site for site in of_blocks if site in working) or tuple(working)

    def layout(self, site: str) -> Layout:
        """Token layout at a site, found by one pass over a blank image.

        Raises:
            ModelError: when there is no such site, or what it gives are no tokens.
        """
        return self._shape(site).layout

    def d_model(self, site: str) -> int:
        """Width of the activations at a site.

        Raises:
            ModelError: when there is no such site, or what it gives are no tokens.
        """
        return self._shape(site).d_model

    @torch.no_grad()
    def tokens(
        self, pixels: Float[Tensor, "image 3 height width"], sites: Sequence[str]
    ) -> Mapping[str, Float[Tensor, "image token d_model"]]:
        """Activations at some sites; the pass stops after the last of them.

        Raises:
            ModelError: when there is no such site, or the pixels have another size.
        """
        shapes = self._measure(sites)
        raw: dict[str, Tensor] = {}

        def keep(site: str, value: Tensor) -> None:
            raw[site] = value.clone()
            if len(raw) == len(shapes):
                raise _EverythingReadError

        with self._lock, contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.suppress(_EverythingReadError))
            for site in shapes:
                self._read(site, keep, stack)
            if shapes:
                self._architecture.forward(self._input(pixels))
        return {site: flatten(raw[site], shape.form) for site, shape in shapes.items()}

    @torch.no_grad()
    def trace(self, pixels: Float[Tensor, "image 3 height width"], sites: Sequence[str]) -> Trace:
        """Activations at some sites and the output, from one forward pass.

        Raises:
            ModelError: when there is no such site, or the pixels have another size.
        """
        shapes = self._measure(sites)
        raw: dict[str, Tensor] = {}
        entry: dict[str, Tensor] = {}
        pixels = self._input(pixels)
        with self._lock, contextlib.ExitStack() as stack:
            for site in shapes:
                self._read(site, lambda site, value: raw.update({site: value.clone()}), stack)
                self._read_entry(site, entry, stack)
            output = self._architecture.forward(pixels)
        for site in shapes:
            if not self._resumes_from_block(site):
                entry[site] = pixels
            elif self._place(site).is_residual:
                entry[site] = raw[site]
        tokens = {site: flatten(raw[site], shape.form) for site, shape in shapes.items()}
        return Trace(tokens=tokens, entry=entry, output=output)

    @torch.no_grad()
    def resume(
        self, trace: Trace, site: str, tokens: Float[Tensor, "image token d_model"]
    ) -> Output:
        """The output when the activations at ``site`` are ``tokens``.

        Raises:
            ModelError: when the tokens have another shape than those of the trace.
        """
        place, shape, entry = self._place(site), self._shape(site), trace.entry[site]
        wanted = (len(entry), shape.layout.n_tokens, shape.d_model)
        if tokens.shape != wanted:
            raise ModelError(
                f"The tokens have shape {tuple(tokens.shape)} instead of {wanted}",
                where=f"{self._identity.name}, {site}",
                fix="Give one activation for each token of each image of the trace",
            )
        tokens = tokens.to(entry.device)

        def change(value: object) -> object:
            return place.put(value, shape.unflatten(tokens, cast(Tensor, place.get(value))))

        with self._lock:
            if not self._resumes_from_block(site):
                with rewriting(place.module, place.side, change):
                    return self._architecture.forward(entry)
            if place.is_residual:
                return self._chain.after(cast(int, place.block), shape.unflatten(tokens, entry))
            return self._chain.within(
                cast(int, place.block), entry, rewriting(place.module, place.side, change)
            )

    def _read(
        self, site: str, keep: Callable[[str, Tensor], None], stack: contextlib.ExitStack
    ) -> None:
        """While the stack is open, let ``keep`` have what the site gives."""
        place = self._place(site)
        stack.enter_context(
            reading(
                place.module, place.side, lambda value: keep(site, cast(Tensor, place.get(value)))
            )
        )

    def _read_entry(self, site: str, entry: dict[str, Tensor], stack: contextlib.ExitStack) -> None:
        """While the stack is open, keep what the block that holds a site takes."""
        place = self._place(site)
        if self._resumes_from_block(site) and not place.is_residual:
            block = self._architecture.blocks[cast(int, place.block)].module
            stack.enter_context(
                reading(block, "input", lambda value: entry.update({site: value.clone()}))
            )

    def _resumes_from_block(self, site: str) -> bool:
        """Whether the blocks before the site's need not run again."""
        return self._architecture.is_chain and self._place(site).block is not None

    def _input(self, pixels: Tensor) -> Tensor:
        """The pixels on the network's device."""
        wanted = (3, *self._preprocessing.size)
        if pixels.shape[1:] != wanted:
            raise ModelError(
                f"The pixels have shape {tuple(pixels.shape)} instead of {('image', *wanted)}",
                where=self._identity.name,
                fix="Make them with the model's own preprocessing",
            )
        return pixels.to(self._architecture.device)

    def _place(self, site: str) -> Place:
        if site not in self._places:
            self._places[site] = find_place(self._architecture, site, self._identity.name)
        return self._places[site]

    def _shape(self, site: str) -> SiteShape:
        return self._measure([site])[site]

    def _measure(self, sites: Sequence[str]) -> dict[str, SiteShape]:
        """How to read some sites; those not seen before are found by one pass over a blank image.

        Raises:
            ModelError: when one of them is no site of this model.
        """
        unseen = [site for site in sites if site not in self._shapes]
        for site, values in self._observe(unseen).items():
            self._shapes[site] = self._shape_of(site, values)
        return {site: self._shapes[site] for site in sites}

    def _shape_of(self, site: str, values: list[Any]) -> SiteShape:
        shape = site_shape(
            self._architecture,
            values,
            site=site,
            name=self._identity.name,
            size=self._preprocessing.size,
        )
        self._require_grid_of_block(site, shape)
        return shape

    def _require_grid_of_block(self, site: str, shape: SiteShape) -> None:
        """Refuse a map inside a block that lies on another grid: a padded window of its tokens."""
        place = self._place(site)
        if place.block is None or place.is_residual or shape.form == "tokens":
            return
        grid = self._shape(f"residual@{place.block}").layout.grid
        if shape.layout.grid != grid:
            raise ModelError(
                f"This site gives a map of {shape.layout.grid} and its block one of {grid}",
                where=f"{self._identity.name}, {site}",
                fix=f"Use residual@{place.block}, or another --image-size",
            )

    @torch.no_grad()
    def _observe(self, sites: Sequence[str]) -> dict[str, list[Any]]:
        """All that each of some sites gives in one pass over a blank image."""
        found: dict[str, list[Any]] = {site: [] for site in sites}
        if found:
            with self._lock, contextlib.ExitStack() as stack:
                for site in found:
                    self._read(site, lambda name, value: found[name].append(value), stack)
                self._run_blank()
        return found

    def _run_blank(self) -> None:
        """Let hooks see a pass over one blank image."""
        size = self._preprocessing.size
        try:
            self._architecture.forward(self._architecture.blank(1, size))
        except RuntimeError as failure:
            raise ModelError(
                f"The model cannot run on an image of {size[0]} × {size[1]} pixels: "
                f"{first_lines(failure)}",
                where=self._identity.name,
                fix="Give another --image-size, or correct the size in the preprocessing",
            ) from failure

    def _gives_tokens(self, site: str, values: list[Any]) -> bool:
        try:
            self._shapes[site] = self._shape_of(site, values)
        except ModelError:
            return False
        return True


def identify(
    network: nn.Module, *, name: str, title: str, revision: str | None = None
) -> ModelIdentity:
    """Which model a network is, by the content of its weights.

    Raises:
        ModelError: when a weight is not finite.
    """
    for key, weights in network.named_parameters():
        if not bool(torch.isfinite(weights).all()):
            raise ModelError(
                "The weights hold NaN or infinite values",
                where=f"{name}, {key}",
                fix="Get the weights again, or look at how they were trained",
            )
    weights_sha256 = hash_tensors(network.state_dict())
    return ModelIdentity(name=name, title=title, weights_sha256=weights_sha256, revision=revision)


class _EverythingReadError(Exception):
    """Ends a pass of which nothing more is wanted; never seen outside this file."""
