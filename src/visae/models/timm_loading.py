"""timm models by name: local weights first, else the hub."""

import dataclasses
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors import SafetensorError
from timm.data.config import resolve_data_config

from visae.errors import ModelError, nearest_names
from visae.models.config import ModelConfig
from visae.models.hooked import HookedModel
from visae.models.timm_models import timm_model
from visae.storage.hub import first_lines, hub_access, hub_failures
from visae.storage.tensors import read_tensors

__all__ = ["load_random_timm", "load_timm"]


def load_timm(config: ModelConfig, name: str, device: torch.device) -> HookedModel:
    """A timm model, frozen, in float32.

    Raises:
        ModelError: for an unknown name (with the nearest ones), weights that do not fit, a hub
            that cannot be reached, or an image size the model cannot take.
    """
    _check_name(name)
    network = _build(name, config)
    pretrained = cast(Any, network).pretrained_cfg
    pretrained.pop("state_dict", None)  # a second copy of the weights
    return timm_model(
        network.to(device),
        name=f"timm/{name}",
        title=config.title or name,
        data_config=_data_config(network, config),
        revision=None if config.weights else _commit(pretrained),
    )


def load_random_timm(config: ModelConfig, name: str, device: torch.device) -> HookedModel:
    """The timm model of ``SEED:NAME`` with the weights that a seed gives, not pretrained ones.

    SAEs of it are the random-backbone control: what they show, the training of the model did not
    bring about.

    Raises:
        ModelError: for another form, an unknown name, weights or a revision given besides, or an
            image size the model cannot take.
    """
    seed, _, rest = name.partition(":")
    name = rest.removeprefix("timm/")
    if not (seed.isascii() and seed.isdecimal()) or config.weights or config.revision:
        raise ModelError(
            "A model with random weights is named by a seed and a timm model, and by nothing else",
            where=config.model,
            fix="Write --model random:0:vit_small_patch16_224, without --weights and --revision",
        )
    _check_name(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed))
        network = _built(name, config, {"pretrained": False})
    return timm_model(
        network.to(device),
        name=f"random:{seed}:timm/{name}",
        title=config.title or f"{name}, random weights",
        data_config=_data_config(network, config),
    )


def _commit(pretrained: dict[str, Any]) -> str | None:
    """The commit that the hub client's cache has the weights of, where it tells."""
    from huggingface_hub import try_to_load_from_cache

    repository, _, revision = str(pretrained.get("hf_hub_id") or "").partition("@")
    if not repository:
        return None
    file = pretrained.get("hf_hub_filename") or "model.safetensors"
    found = try_to_load_from_cache(repository, file, revision=revision or None)
    return Path(found).parent.name if isinstance(found, str) else None


def _check_name(name: str) -> None:
    """Refuse a name, or what follows its full stop, that timm does not know."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        what, known = f"There is no timm model named {architecture}", timm.list_models()
    else:
        what = f"timm knows no weights {tag} of {architecture}"
        known = timm.list_models(f"{architecture}.*", include_tags=True)
        if not tag or name in known:
            return
    raise ModelError(
        what,
        where="--model",
        fix=f"Use one of the nearest names: {nearest_names(name, known)}",
    )


def _data_config(network: torch.nn.Module, config: ModelConfig) -> dict[str, Any]:
    """The model's own preprocessing, for the input size asked for, if any."""
    size = config.image_size
    wanted = {} if size is None else {"input_size": (3, size, size)}
    return cast(dict[str, Any], cast(Any, resolve_data_config)(wanted, model=network))


def _build(name: str, config: ModelConfig) -> torch.nn.Module:
    options: dict[str, Any] = {"pretrained": True}
    if config.weights is not None:
        options |= _local_weights(name, config.weights)
    elif config.revision is not None:
        repository = cast(Any, timm.get_pretrained_cfg(name)).hf_hub_id
        options["pretrained_cfg_overlay"] = {"hf_hub_id": f"{repository}@{config.revision}"}
    try:
        with hub_access() as online:
            return _built(name, config, options)
    except FileNotFoundError as failure:
        problem = "does not have these weights" if online else "cannot be reached"
        raise ModelError(
            f"The weights of {name} are not in the local cache and the model hub {problem}",
            where="--model",
            fix="Connect to the network, or give a safetensors file with --weights",
        ) from failure
    except hub_failures() as failure:
        raise ModelError(
            f"The weights of {name} could not be downloaded: {first_lines(failure)}",
            where="--model",
            fix="Try again, or give a safetensors file with --weights",
        ) from failure


def _built(name: str, config: ModelConfig, options: dict[str, Any]) -> torch.nn.Module:
    """The network, or what about its weights or image size does not fit."""
    try:
        return _create(name, config.image_size, options)
    except OSError:  # a download's; some of them are ValueErrors too
        raise
    except (
        RuntimeError,
        ValueError,
        AssertionError,
        TypeError,
        LookupError,
        SafetensorError,
    ) as failure:
        raise ModelError(
            f"Cannot build {name} with these weights: {first_lines(failure)}",
            where=config.weights or "--model",
            fix="Give weights with this model's own tensor names and shapes, "
            "and an image size it can take",
        ) from failure


def _create(name: str, image_size: int | None, options: dict[str, Any]) -> torch.nn.Module:
    if image_size is None:
        return timm.create_model(name, **options)
    try:
        return timm.create_model(name, img_size=image_size, **options)
    except TypeError:  # a convolutional model takes any size and has no such argument
        return timm.create_model(name, **options)


def _local_weights(name: str, path: Path) -> dict[str, Any]:
    """Options that make timm load a local file strictly, with its head's own class count."""
    if path.suffix != ".safetensors":
        raise ModelError(
            "Weights are read from safetensors files only",
            where=path,
            fix="Convert the file with safetensors.torch.save_file; pickles are never opened",
        )
    state = read_tensors(path, error=ModelError)
    known = timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg()
    heads = known.classifier
    classifier = heads if isinstance(heads, str) else next(iter(heads or ()), None)
    weight = state.get(f"{classifier}.weight")
    n_classes = 0 if weight is None else int(weight.shape[0])
    overlay = {"state_dict": state, "num_classes": n_classes, "label_offset": 0}
    fields = {f.name for f in dataclasses.fields(known)}
    return {
        "num_classes": n_classes,
        "pretrained_cfg_overlay": {k: v for k, v in overlay.items() if k in fields},
    }
