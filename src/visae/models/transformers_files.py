"""A transformers model's configuration and weights, read without its own loader.

Of the weights only the tensors that a tower needs are read, from safetensors files, shard by
shard: the language model of a LLaVA-style model is never built and never read.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from visae.errors import ModelError
from visae.models.config import ModelConfig
from visae.models.files import ModelFiles, hub_files, local_files, read_json
from visae.models.names import TRANSFORMERS_CONFIG, is_folder
from visae.storage.hub import first_lines

__all__ = [
    "build_from_tensors",
    "find_transformers",
    "quiet",
    "read_config",
    "read_some_tensors",
    "require_transformers",
]

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def require_transformers() -> ModuleType:
    """The package transformers.

    Raises:
        ModelError: when it is not installed.
    """
    try:
        import transformers
    except ImportError as failure:
        raise ModelError(
            "The package transformers is not installed",
            where="--model",
            fix='Install it with: pip install "visae[transformers]"',
        ) from failure
    module: ModuleType = transformers
    return module


@contextlib.contextmanager
def find_transformers(config: ModelConfig, name: str) -> Iterator[ModelFiles]:
    """The files of a folder, or of a hub's repository; inside the block the hub is at hand.

    Raises:
        ModelError: as ``hub_files``.
    """
    require_transformers()
    if is_folder(name):
        yield local_files(Path(name).expanduser())
        return
    with hub_files(name, revision=config.revision, first=(TRANSFORMERS_CONFIG,)) as files:
        yield files


def read_config(files: ModelFiles) -> Any:
    """The model's configuration, as transformers reads it; no code of the repository is run.

    Raises:
        ModelError: when it is missing, unreadable, or of a kind that transformers does not know.
    """
    path = files.require(
        TRANSFORMERS_CONFIG, fix="Give a folder or repository in the layout of transformers"
    )
    try:
        with quiet():
            return require_transformers().AutoConfig.from_pretrained(
                path.parent, local_files_only=True, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError, TypeError) as failure:
        raise ModelError(
            f"This is no transformers model: {first_lines(failure)}",
            where=path,
            fix="Give a folder or repository in the layout of transformers",
        ) from failure


def read_some_tensors(
    files: ModelFiles, weights: Path | None, wanted: Callable[[str], bool]
) -> dict[str, Tensor]:
    """The tensors whose names are wanted, by name, from one safetensors file or from shards.

    Raises:
        ModelError: when there is no safetensors file, or one is not whole.
    """
    if weights is not None and weights.suffix != ".safetensors":
        raise ModelError(
            "Weights are read from safetensors files only",
            where=weights,
            fix="Convert the file with safetensors.torch.save_file; pickles are never opened",
        )
    found: dict[str, Tensor] = {}
    for path in [weights] if weights else _shards(files, wanted):
        found |= _read(path, wanted)
    return found


def _shards(files: ModelFiles, wanted: Callable[[str], bool]) -> list[Path]:
    """The files that hold the wanted tensors; only these are fetched."""
    fix = "Save it with save_pretrained (safetensors); pickles are never opened"
    path = files.require(*_WEIGHTS, fix=fix)
    if path.suffix != ".json":
        return [path]
    places = read_json(path).get("weight_map", {})
    names = sorted({file for tensor, file in places.items() if wanted(tensor)})
    return [files.require(name, fix=fix) for name in names]


def _read(path: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118
    except (SafetensorError, OSError) as failure:
        raise ModelError(
            f"This is not a whole safetensors file: {failure}",
            where=path,
            fix="It was altered or cut short: make it again or restore it",
        ) from failure


def build_from_tensors(
    kind: str, config: Any, tensors: dict[str, Tensor], **options: Any
) -> nn.Module:
    """A network of a class of transformers with all its weights from ``tensors``, in float32.

    Names from older checkpoints are understood as by transformers itself; tensors that the class
    does not have are left aside.

    Raises:
        ModelError: when a weight is missing or has another shape.
    """
    network_class = getattr(require_transformers(), kind)
    try:
        with quiet():
            network, report = network_class.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as failure:
        raise _unfit(kind, first_lines(failure)) from failure
    if report["mismatched_keys"]:
        name, *shapes = sorted(report["mismatched_keys"])[0]
        has, wants = (tuple(shape) for shape in shapes)
        raise _unfit(kind, f"{name} has shape {has} instead of {wants}")
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise _unfit(kind, f"{len(missing)} tensors are missing: {', '.join(missing[:4])}")
    built: nn.Module = network.eval()
    return built


def _unfit(kind: str, problem: str) -> ModelError:
    return ModelError(
        f"Cannot build {kind} with these weights: {problem}",
        where="--model",
        fix="Give weights with this model's own tensor names and shapes",
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from drawing bars and listing what visae checks itself."""
    messages: Any = require_transformers().utils.logging
    logger = logging.getLogger("transformers")
    level, draws = logger.level, messages.is_progress_bar_enabled()
    logger.setLevel(logging.CRITICAL)
    messages.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if draws:
            messages.enable_progress_bar()
