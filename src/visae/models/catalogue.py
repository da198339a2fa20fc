"""Which models there are, and what each offers: widths, blocks, layout and sites, from no weights.

Networks are built on torch's meta device, which holds shapes and no numbers: nothing is
downloaded, and a network of a billion weights takes a second and no memory.
"""

import dataclasses
import difflib
import fnmatch
import importlib.util
from collections.abc import Sequence
from typing import Any, cast

import timm
import torch
from timm.data.config import resolve_data_config

from visae.errors import ModelError
from visae.models.architecture import Architecture
from visae.models.config import ModelIdentity
from visae.models.hooked import HookedModel
from visae.models.layout import Layout
from visae.models.names import parse_model_name
from visae.models.preprocessing import Preprocessing
from visae.models.protocol import VisionModel
from visae.models.timm_models import timm_architecture
from visae.models.transformers_families import FAMILIES
from visae.storage.hub import first_lines

__all__ = ["ModelSummary", "SiteSummary", "find_models", "summarise", "summarise_name"]

_DASH = "\N{EN DASH}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiteSummary:
    """What a site gives."""

    name: str
    """The site."""
    d_model: int
    """Width of its activations."""
    layout: Layout
    """Order of its tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSummary:
    """What a model offers."""

    name: str
    """What ``--model`` takes."""
    size: tuple[int, int]
    """Height and width of its input in pixels."""
    n_blocks: int
    """Blocks of its residual stream; 0 for convolutional and hierarchical models."""
    sites: tuple[SiteSummary, ...]
    """Its named sites, in order; module paths are accepted besides."""
    problem: str = ""
    """Why it cannot be used, if it cannot."""

    @property
    def widths(self) -> str:
        """Width of the residual stream, or the range over the stages."""
        found = [s.d_model for s in self.sites if "@" not in s.name or s.name.startswith("res")]
        if not found:
            return _DASH
        return str(found[0]) if len(set(found)) == 1 else f"{min(found)}{_DASH}{max(found)}"

    @property
    def tokens(self) -> str:
        """Special tokens and patch grid, or the grids of the first and the last stage."""
        if not self.sites:
            return _DASH
        first, last = (_grid(site.layout) for site in (self.sites[0], self.sites[-1]))
        grid = first if first == last else f"{first} to {last}"
        return " + ".join([*_short(self.sites[0].layout.special), grid])

    @property
    def kinds(self) -> str:
        """The sites in short: ``residual, mlp, attention, heads @ 0–11``."""
        if not self.sites:
            return self.problem or "module paths only"
        kinds = dict.fromkeys(s.name.partition("@")[0] for s in self.sites if "@" in s.name)
        if not kinds:
            return ", ".join(site.name for site in self.sites)
        return f"{', '.join(kinds)} @ 0{_DASH}{self.n_blocks - 1}"


def find_models(pattern: str | None = None) -> list[str]:
    """The names that a pattern fits: a wildcard pattern, or a part of a name in any case.

    Raises:
        ModelError: when it fits none, with the nearest names.
    """
    names = _names()
    if pattern is None:
        return names
    if trained := _with_tag(pattern):
        return [trained]
    wanted = pattern.lower()
    if any(mark in wanted for mark in "*?["):
        found = [n for n in names if fnmatch.fnmatch(n.lower(), wanted)]
        found = found or [n for n in names if fnmatch.fnmatch(n.lower(), f"*/{wanted}")]
    else:
        exact = [n for n in names if wanted in (n.lower(), n.lower().partition("/")[2])]
        found = exact or [n for n in names if wanted in n.lower()]
    if not found:
        near = ", ".join(_nearest(wanted.strip("*?").rpartition("/")[2], names))
        raise ModelError(
            f"No model's name fits {pattern}", where="visae models", fix=f"The nearest are: {near}"
        )
    return found


def _with_tag(name: str) -> str | None:
    """The full name of a model with the tag of its weights, if that is what was given."""
    if name.removeprefix("timm/") in timm.list_pretrained():
        return f"timm/{name.removeprefix('timm/')}"
    adapter, _, trained = name.partition("/")
    if adapter == "open_clip" and importlib.util.find_spec("open_clip"):
        import open_clip

        if tuple(trained.split("/")) in open_clip.list_pretrained():
            return name
    return None


def _nearest(wanted: str, names: Sequence[str]) -> list[str]:
    """Names written alike, or else those that share the beginning of what was wanted."""
    short = [name.partition("/")[2] for name in names]
    close = difflib.get_close_matches(wanted, short, n=5, cutoff=0.6)
    while not close and wanted:
        wanted = wanted[:-1]
        close = [name for name in short if wanted in name.lower()][:5]
    return close


def summarise_name(name: str) -> ModelSummary:
    """What a model offers that ``find_models`` names; built without weights in about a second."""
    try:
        model = _on_meta(name)
        if not model.sites:
            size = model.preprocessing.size
            return ModelSummary(name=name, size=size, n_blocks=0, sites=())
        return dataclasses.replace(summarise(model), name=name)
    except (ModelError, RuntimeError, TypeError, ValueError, LookupError) as failure:
        problem = failure.what if isinstance(failure, ModelError) else first_lines(failure)
        return ModelSummary(name=name, size=(0, 0), n_blocks=0, sites=(), problem=problem)


def summarise(model: VisionModel) -> ModelSummary:
    """What a loaded model offers, every site of it; costs one pass over a blank image."""
    blocks = {site.partition("@")[2] for site in model.sites if "@" in site}
    return ModelSummary(
        name=model.identity.name,
        size=model.preprocessing.size,
        n_blocks=len(blocks),
        sites=tuple(
            SiteSummary(name=site, d_model=model.d_model(site), layout=model.layout(site))
            for site in model.sites
        ),
    )


def _names() -> list[str]:
    """Every name, adapter by adapter; those of packages that are not installed are left out."""
    names = [f"timm/{name}" for name in timm.list_models()]
    if importlib.util.find_spec("open_clip"):
        import open_clip

        names += [f"open_clip/{name}" for name in open_clip.list_models()]
    if importlib.util.find_spec("transformers"):
        families = {family.config: kind for kind, family in reversed(FAMILIES.items())}
        names += [f"transformers/OWNER/NAME ({kind})" for kind in sorted(families.values())]
    return names


def _on_meta(name: str) -> HookedModel:
    """A model without weights."""
    adapter, rest = parse_model_name(name)
    with torch.device("meta"):
        if adapter == "timm":
            architecture, size = _timm(rest)
        elif adapter == "open_clip":
            architecture, size = _open_clip(rest)
        else:
            architecture, size = _transformers(rest.partition("(")[2].removesuffix(")"))
    return HookedModel(
        architecture,
        identity=ModelIdentity(name=name, title=rest, weights_sha256=""),
        preprocessing=Preprocessing(size=size),
    )


def _timm(name: str) -> tuple[Architecture, tuple[int, int]]:
    network = timm.create_model(name, pretrained=False)
    size = cast(Any, resolve_data_config)({}, model=network)["input_size"][1:]
    return timm_architecture(network, tuple(size)), tuple(size)


def _open_clip(name: str) -> tuple[Architecture, tuple[int, int]]:
    """The image tower; the text tower, which may need the hub, is made as small as it can be."""
    from visae.models.open_clip_files import require_open_clip
    from visae.models.open_clip_models import build_open_clip, open_clip_architecture

    settings = require_open_clip().get_model_config(name.partition("/")[0])
    settings["text_cfg"] = {"width": 8, "heads": 1, "layers": 1}
    if "multimodal_cfg" in settings:
        settings["multimodal_cfg"] |= {"width": 8, "heads": 1, "layers": 1}
        settings["text_cfg"] |= {"output_tokens": True}
    tower = cast(Any, build_open_clip(settings)).visual
    side = tower.image_size
    return open_clip_architecture(tower), (side, side) if isinstance(side, int) else tuple(side)


def _transformers(kind: str) -> tuple[Architecture, tuple[int, int]]:
    """A family at the size that its configuration has by itself."""
    from visae.models.transformers_files import require_transformers
    from visae.models.transformers_models import transformers_architecture

    transformers, family = require_transformers(), FAMILIES[kind]
    config = getattr(transformers, family.config)()
    if family.tower == "ViTMAEModel":
        config.mask_ratio = 0.0
    side = getattr(config, "image_size", None) or 256
    network = getattr(transformers, family.tower)(config).eval()
    return transformers_architecture(network, family, size=(side, side)), (side, side)


def _grid(layout: Layout) -> str:
    return f"{layout.grid[0]} × {layout.grid[1]}"


def _short(special: Sequence[str]) -> list[str]:
    """Names of special tokens, registers counted."""
    n_registers = sum(name.startswith("register") for name in special)
    named = [name for name in special if not name.startswith("register")]
    return [*named, f"{n_registers} registers"] if n_registers else named
