"""Which open_clip network a name means, where its weights are, and what its images go through.

A name is an architecture with a pretrained tag (``ViT-B-16/laion2b_s34b_b88k``), an architecture
with a local weights file, a hub repository in open_clip's layout (``hf-hub:imageomics/bioclip``)
or a local folder in that layout (``local-dir:FOLDER``).

Weights are safetensors wherever there are any. A ``.pt``, ``.pth`` or ``.bin`` file is read by
torch's reader of tensors alone (``weights_only``), which runs no code that a file may hold.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from visae.errors import ModelError, nearest_names
from visae.models.config import ModelConfig
from visae.models.files import ModelFiles, hub_files, local_files, read_json
from visae.models.names import LOCAL_DIR, OPEN_CLIP_CONFIG

__all__ = ["OpenClipSource", "find_open_clip", "require_open_clip"]

_HUB = "hf-hub:"
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "model.safetensors",
    "open_clip_pytorch_model.bin",
)
_PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenClipSource:
    """One open_clip model: what it is made of, and its files."""

    name: str
    """Its name for identities: ``ViT-B-16/openai``, ``imageomics/bioclip`` or a folder's name."""
    model: Mapping[str, Any]
    """Widths and depths, as open_clip's configuration files give them."""
    preprocessing: Mapping[str, Any]
    """Those of mean, std, interpolation and resize_mode that are not open_clip's defaults."""
    weights: Path
    """File with the weights of image and text tower."""
    tokenizer: str
    """What open_clip finds the tokenizer by."""
    revision: str | None
    """Commit of the hub's repository."""


def require_open_clip() -> ModuleType:
    """The package open_clip.

    Raises:
        ModelError: when it is not installed.
    """
    try:
        import open_clip
    except ImportError as failure:
        raise ModelError(
            "The package open_clip is not installed",
            where="--model",
            fix='Install it with: pip install "visae[clip]"',
        ) from failure
    module: ModuleType = open_clip
    return module


@contextlib.contextmanager
def find_open_clip(config: ModelConfig, name: str) -> Iterator[OpenClipSource]:
    """The model that a name means; inside the block the hub client waits for nothing in vain.

    Raises:
        ModelError: for an unknown name or tag (with the nearest), missing or unsuitable files, or
            a hub that cannot be reached.
    """
    if name.startswith(_HUB):
        repository = name.removeprefix(_HUB)
        with hub_files(repository, revision=config.revision, first=(OPEN_CLIP_CONFIG,)) as files:
            yield _from_files(files, config, tokenizer=name)
    elif name.startswith(LOCAL_DIR) or Path(name).expanduser().is_dir():
        folder = Path(name.removeprefix(LOCAL_DIR)).expanduser()
        yield _from_files(local_files(folder), config, tokenizer=LOCAL_DIR + str(folder))
    else:
        with _built_in(config, name) as source:
            yield source


def _from_files(files: ModelFiles, config: ModelConfig, *, tokenizer: str) -> OpenClipSource:
    """A model described by an ``open_clip_config.json``."""
    path = files.require(
        OPEN_CLIP_CONFIG, fix="Give a folder or repository in the layout of open_clip"
    )
    settings = read_json(path)
    if not isinstance(settings.get("model_cfg"), dict):
        raise ModelError(
            "This file does not describe an open_clip model: it has no model_cfg",
            where=path,
            fix="Restore the model's own file",
        )
    weights = config.weights or files.require(
        *_WEIGHTS, fix="Put the model's weights there as open_clip_model.safetensors"
    )
    return OpenClipSource(
        name=files.name,
        model=settings["model_cfg"],
        preprocessing=_chosen(settings.get("preprocess_cfg") or {}),
        weights=_readable(weights),
        tokenizer=tokenizer,
        revision=None if config.weights else files.revision,
    )


@contextlib.contextmanager
def _built_in(config: ModelConfig, name: str) -> Iterator[OpenClipSource]:
    """A model whose architecture open_clip knows by name."""
    architecture, _, tag = name.partition("/")
    model = _architecture(architecture)
    tags = _tags(architecture)
    if tag and tag not in tags:
        raise ModelError(
            f"open_clip knows no weights {tag} of {architecture}",
            where="--model",
            fix=f"Use one of: {nearest_names(tag, tags)}",
        )
    if tag and tags[tag].get("quick_gelu"):
        model["quick_gelu"] = True  # what the weights were trained with
    source = OpenClipSource(
        name=name,
        model=model,
        preprocessing=_chosen(tags[tag]) if tag else _common(architecture, tags),
        weights=_readable(config.weights) if config.weights else Path(),
        tokenizer=architecture,
        revision=None,
    )
    if config.weights:
        yield source
        return
    if not tag:
        raise ModelError(
            f"{architecture} is an architecture without weights",
            where="--model",
            fix=f"Add one of its tags (open_clip/{architecture}/TAG: {', '.join(tags) or 'none'}), "
            "or give a file with --weights",
        )
    repository, _, file = str(tags[tag]["hf_hub"]).rpartition("/")
    names = (f"{Path(file).stem}.safetensors", file) if file else _WEIGHTS
    with hub_files(repository, revision=config.revision, first=names) as files:
        weights = files.require(*names, fix="Choose other weights")
        yield dataclasses.replace(source, weights=weights, revision=files.revision)


def _architecture(name: str) -> dict[str, Any]:
    open_clip = require_open_clip()
    known = open_clip.list_models()
    if name not in known:
        raise ModelError(
            f"There is no open_clip model named {name}",
            where="--model",
            fix=f"Use one of the nearest names: {nearest_names(name, known)}; or "
            "open_clip/hf-hub:OWNER/NAME",
        )
    model: dict[str, Any] = open_clip.get_model_config(name)
    return model


def _tags(architecture: str) -> dict[str, dict[str, Any]]:
    """The pretrained weights of an architecture that are on the hub, by tag."""
    from open_clip.pretrained import get_pretrained_cfg

    tags = require_open_clip().list_pretrained_tags_by_model(architecture)
    found = {tag: get_pretrained_cfg(architecture, tag) for tag in tags}
    return {tag: settings for tag, settings in found.items() if settings.get("hf_hub")}


def _chosen(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: settings[key] for key in _PREPROCESSING if settings.get(key) is not None}


def _common(architecture: str, tags: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The preprocessing of an architecture of which all weights agree.

    Raises:
        ModelError: when they do not, so that a file alone does not say how its images are made.
    """
    found = [_chosen(settings) for settings in tags.values()]
    if any(other != found[0] for other in found):
        raise ModelError(
            f"The weights of {architecture} differ in how images are made for them",
            where="--weights",
            fix=f"Name the training that the file comes from: open_clip/{architecture}/TAG with "
            f"TAG one of {', '.join(tags)}",
        )
    return found[0] if found else {}


def _readable(weights: Path) -> Path:
    if weights.suffix not in _SUFFIXES or not weights.is_file():
        what = "is missing" if weights.suffix in _SUFFIXES else "is no weights file"
        raise ModelError(
            f"The file {weights.name} {what}",
            where=weights,
            fix=f"Give a file of open_clip's own tensor names: {', '.join(_SUFFIXES)}",
        )
    return weights
