"""From a ``ModelConfig`` to a frozen ``VisionModel``, by the adapter that its name asks for."""

import torch

from visae.errors import ModelError
from visae.models.config import ModelConfig
from visae.models.names import parse_model_name
from visae.models.protocol import TextTower, VisionModel

__all__ = ["choose_device", "load_model", "load_text_tower"]


def choose_device(device: str) -> torch.device:
    """``auto`` is the GPU where there is one, else the CPU.

    Raises:
        ModelError: when the device named is not on this machine.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as failure:
        reason = str(failure).splitlines()[0]
        raise ModelError(
            f"Cannot use device {device}: {reason}", fix="Use --device cpu or auto"
        ) from failure
    return torch.device(device)


def load_model(config: ModelConfig, *, device: str = "auto") -> VisionModel:
    """A frozen model in evaluation mode, in float32, on a device.

    Names are those of timm (with or without ``timm/``), ``open_clip/…``, ``transformers/…``,
    ``python:MODULE:FUNCTION``, ``random:SEED:NAME`` for a timm model with random weights, or a
    folder that holds an open_clip or transformers model.

    Raises:
        ModelError: for an unknown name (with the nearest ones), weights that do not fit, a hub
            that cannot be reached, a package that is not installed, or an image size the model
            cannot take.
    """
    adapter, name = parse_model_name(config.model)
    place = choose_device(device)
    if adapter == "open_clip":
        from visae.models.open_clip_models import load_open_clip

        return load_open_clip(config, name, place)
    if adapter == "transformers":
        from visae.models.transformers_models import load_transformers

        return load_transformers(config, name, place)
    if adapter == "python":
        from visae.models.custom import load_custom

        return load_custom(config, place)
    from visae.models.timm_loading import load_random_timm, load_timm

    return (load_random_timm if adapter == "random" else load_timm)(config, name, place)


def load_text_tower(config: ModelConfig, *, device: str = "auto") -> TextTower:
    """The text tower that belongs to a model, with its tokenizer.

    Its vectors are compared with ``Output.embedding`` of the model that ``load_model`` gives for
    the same config: cosine · ``logit_scale`` + ``logit_bias``.

    Raises:
        ModelError: when the model has no text tower, and as ``load_model``.
    """
    adapter, name = parse_model_name(config.model)
    place = choose_device(device)
    if adapter == "open_clip":
        from visae.models.open_clip_texts import load_open_clip_texts

        return load_open_clip_texts(config, name, place)
    if adapter == "transformers":
        from visae.models.transformers_texts import load_transformers_texts

        return load_transformers_texts(config, name, place)
    raise ModelError(
        f"{config.model} has no text tower",
        where="--model",
        fix="Use an open_clip or transformers model that was trained with texts",
    )
