"""From what a user calls a model to the adapter that loads it."""

from pathlib import Path
from typing import Literal, NamedTuple

from visae.errors import ModelError
from visae.storage.portable import portable, resolve_portable

__all__ = [
    "LOCAL_DIR",
    "OPEN_CLIP_CONFIG",
    "TRANSFORMERS_CONFIG",
    "Adapter",
    "ModelName",
    "is_folder",
    "parse_model_name",
    "portable_model",
    "resolve_model",
]

LOCAL_DIR = "local-dir:"
Adapter = Literal["timm", "open_clip", "transformers", "python", "random"]

OPEN_CLIP_CONFIG = "open_clip_config.json"
TRANSFORMERS_CONFIG = "config.json"


class ModelName(NamedTuple):
    """A model's name, taken apart."""

    adapter: Adapter
    """What loads it."""
    name: str
    """What the adapter calls it, or a folder."""


def parse_model_name(model: str) -> ModelName:
    """The adapter and its name for the model.

    A folder is recognised by the configuration file in it; any other name without an adapter in
    front is timm's.

    Raises:
        ModelError: for a folder without a model, or a name that begins with no adapter's.
    """
    if model.startswith("python:"):
        return ModelName("python", model)
    if model.startswith("random:"):
        return ModelName("random", model.removeprefix("random:"))
    adapter, slash, name = model.partition("/")
    for known in ("timm", "open_clip", "transformers"):
        if slash and adapter == known:
            return ModelName(known, name)
    if is_folder(model):
        return ModelName(_adapter_of(Path(model).expanduser()), model)
    if slash:
        raise ModelError(
            f"There is no adapter named {adapter}, and no folder {model}",
            where="--model",
            fix=f"Use timm/NAME, open_clip/NAME, open_clip/hf-hub:{model}, transformers/{model}, "
            "python:MODULE:FUNCTION, random:SEED:NAME, or a folder",
        )
    return ModelName("timm", model)


def is_folder(name: str) -> bool:
    """Whether a name is meant as a folder: it is written as a path, or holds a model."""
    path = Path(name).expanduser()
    looks_like_one = name.startswith((".", "/", "~")) or "/" in name
    has_model = any((path / file).is_file() for file in (OPEN_CLIP_CONFIG, TRANSFORMERS_CONFIG))
    return path.is_dir() and (looks_like_one or has_model)


def portable_model(model: str, folder: Path) -> str:
    """How ``folder``'s files should write a model's name: a model's own folder as ``portable``."""
    adapter, _, name = model.partition("/")
    path = name.removeprefix(LOCAL_DIR)
    if adapter in ("open_clip", "transformers") and is_folder(path):
        return f"{adapter}/{portable(Path(path).expanduser(), folder)}"
    if adapter != "timm" and is_folder(model):
        whole = Path(model).expanduser()
        return f"{_adapter_of(whole)}/{portable(whole, folder)}"
    return model


def resolve_model(text: str, folder: Path) -> str:
    """The model that a file in ``folder`` means by what ``portable_model`` wrote."""
    adapter, slash, name = text.partition("/")
    if slash and name.startswith("../"):
        return f"{adapter}/{resolve_portable(name, folder)}"
    return text


def _adapter_of(folder: Path) -> Adapter:
    if (folder / OPEN_CLIP_CONFIG).is_file():
        return "open_clip"
    if (folder / TRANSFORMERS_CONFIG).is_file():
        return "transformers"
    raise ModelError(
        "This folder holds no model",
        where=folder,
        fix=f"Give a folder with {OPEN_CLIP_CONFIG} (open_clip) or {TRANSFORMERS_CONFIG} "
        "(transformers), or a model's name",
    )
