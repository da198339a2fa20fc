"""The preprocessing that a transformers model's own image processor does.

An image processor resizes, crops, divides by 255 and normalises. What is expressed here gives its
pixels but for the rounding of the resize: transformers resizes with torchvision, visae with
Pillow. A processor that pads, or makes inputs of several sizes, is refused.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from visae.errors import ModelError
from visae.models.files import ModelFiles
from visae.models.preprocessing import Interpolation, Preprocessing
from visae.models.transformers_files import require_transformers
from visae.storage.hub import first_lines

__all__ = ["read_patch_processor", "read_processor"]

_FILES = ("preprocessor_config.json", "processor_config.json")
_FILTERS: dict[int, Interpolation] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
_PLAIN = ("Bit", "CLIP", "DINOv3ViT", "DeiT", "Llava", "Siglip", "ViT")


def read_processor(files: ModelFiles) -> Preprocessing:
    """How a model's image processor makes its input.

    Raises:
        ModelError: when its file is missing, or it does what a ``Preprocessing`` cannot say.
    """
    return _read(files, _preprocessing)


def read_patch_processor(files: ModelFiles, image_size: int | None) -> Preprocessing:
    """The square input of a model that takes any aspect (SigLIP 2 in its NaFlex form).

    Its own processor keeps the aspect of each image, so that images differ in their patch grids;
    one layout for all needs one size, which the user has to choose.

    Raises:
        ModelError: when no size is given, or it is no whole number of patches.
    """

    def squashed(settings: Mapping[str, Any]) -> Preprocessing:
        patch = settings["patch_size"]
        if image_size is None or image_size < patch or image_size % patch:
            side = math.isqrt(settings["max_num_patches"]) * patch
            raise ModelError(
                f"{files.name} takes images of any aspect, {patch} pixels a patch; "
                "a store needs one grid for all",
                where="--image-size",
                fix=f"Give a multiple of {patch}, such as --image-size {side}: images are squashed "
                "to that square",
            )
        return Preprocessing(
            size=(image_size, image_size),
            crop="squash",
            interpolation=_FILTERS[settings["resample"]],
            mean=_three(settings["image_mean"]),
            std=_three(settings["image_std"]),
        )

    return _read(files, squashed)


def _read(
    files: ModelFiles, express: Callable[[Mapping[str, Any]], Preprocessing]
) -> Preprocessing:
    path = files.require(
        *_FILES, fix="Put the model's own preprocessor_config.json into its folder"
    )
    try:
        processor = require_transformers().AutoImageProcessor.from_pretrained(
            path.parent, local_files_only=True
        )
        return express(processor.to_dict())
    except (KeyError, TypeError, ValueError, OSError) as failure:
        raise ModelError(
            f"The image processor cannot be expressed: {first_lines(failure)}",
            where=path,
            fix="Choose a model whose images are resized, cropped at the centre and normalised",
        ) from failure


def _preprocessing(settings: Mapping[str, Any]) -> Preprocessing:
    _require_plain(settings)
    edge, squashed = _scaled(settings["size"])
    crops = settings.get("do_center_crop", False)
    size = _sides(settings["crop_size"]) if crops else edge
    if not crops and not squashed:
        raise ValueError("it keeps the aspect ratio and does not crop")
    normalises = settings.get("do_normalize", False)
    return Preprocessing(
        size=size,
        crop_share=_share(size, edge),
        crop="squash" if squashed else "center",
        odd_margin="down",
        interpolation=_FILTERS[settings["resample"]],
        mean=_three(settings["image_mean"]) if normalises else (0.0, 0.0, 0.0),
        std=_three(settings["image_std"]) if normalises else (1.0, 1.0, 1.0),
    )


def _require_plain(settings: Mapping[str, Any]) -> None:
    kind = str(settings["image_processor_type"]).removesuffix("Pil").removesuffix("Fast")
    if kind.removesuffix("ImageProcessor") not in _PLAIN:
        raise ValueError(f"a {kind} is not among the plain ones ({', '.join(_PLAIN)})")
    if not settings.get("do_resize") or not settings.get("do_rescale"):
        raise ValueError("it does not resize, or does not rescale")
    if settings.get("do_pad"):
        raise ValueError("it pads")
    if not math.isclose(settings["rescale_factor"], 1 / 255, rel_tol=1e-6):
        raise ValueError(f"it rescales by {settings['rescale_factor']} instead of 1/255")


def _scaled(size: object) -> tuple[tuple[int, int], bool]:
    """The sides that an image is scaled to, and whether it is squashed to them."""
    if isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
        return (int(size["shortest_edge"]),) * 2, False
    return _sides(size), True


def _sides(size: object) -> tuple[int, int]:
    """Height and width, from either or from one number for both."""
    if isinstance(size, int):
        return size, size
    if not isinstance(size, Mapping) or set(size) != {"height", "width"}:
        raise ValueError(f"it makes images of the size {size}")
    return int(size["height"]), int(size["width"])


def _share(size: tuple[int, int], edge: tuple[int, int]) -> float:
    """The crop share with which an input of ``size`` is scaled to exactly ``edge`` before."""
    share = size[0] / edge[0]
    for candidate in (share, math.nextafter(share, 0.0), math.nextafter(share, 1.0)):
        if 0 < candidate <= 1 and _scaled_sides(size, candidate) == edge:
            return candidate
    raise ValueError(f"it crops {size} out of {edge}")


def _scaled_sides(size: tuple[int, int], share: float) -> tuple[int, int]:
    return math.floor(size[0] / share), math.floor(size[1] / share)


def _three(values: object) -> tuple[float, float, float]:
    """A value for each channel, from three or from one for all."""
    if isinstance(values, int | float):
        return (float(values),) * 3
    if not isinstance(values, list | tuple) or len(values) != 3:
        raise ValueError(f"it normalises {values} channels")
    return float(values[0]), float(values[1]), float(values[2])
