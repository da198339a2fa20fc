"""Any network of one's own as a ``VisionModel``: name the modules whose output is wanted.

``wrap_model`` makes the model; a function that returns it can be named on the command line and in a
store as ``python:MODULE:FUNCTION``, and ``load_custom`` calls it.
"""

import contextlib
import dataclasses
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visae.errors import ModelError, nearest_names
from visae.models.architecture import Architecture, Block
from visae.models.config import ModelConfig
from visae.models.hooked import HookedModel, identify
from visae.models.hooks import main, reading
from visae.models.layout import Layout
from visae.models.preprocessing import Preprocessing
from visae.models.protocol import Output, VisionModel
from visae.models.shapes import flatten, map_form

__all__ = ["load_custom", "wrap_model"]

_DECLARED = (VisionModel, HookedModel, "VisionModel", "HookedModel")


def wrap_model(
    network: nn.Module,
    *,
    name: str,
    preprocessing: Preprocessing,
    sites: Mapping[str, Layout | None],
    blocks: Sequence[str] = (),
) -> HookedModel:
    """A network as a frozen ``VisionModel`` in evaluation mode, where its weights are.

    ``network(pixels)``, of pixels (image, 3, height, width), gives logits (image, class), final
    tokens (image, token, d_out), a final feature map (image, d_out, rows, columns), or an
    ``Output``. With logits alone, the final tokens are those of the last of ``sites``.

    Args:
        network: Any module; it is set to evaluation mode and its weights are frozen.
        name: What every file calls the model: ``mine/small-cnn``.
        preprocessing: How images become its input.
        sites: Module paths, in the order in which they run, and the layout of what each gives:
            tokens (image, token, d_model) need one, feature maps with the channels first or last
            may have None. Of a tuple, the first element is meant where there is a layout.
        blocks: Module paths of blocks that follow one another, each taking the tokens of the one
            before. They become ``residual@0``, … and the network is resumed from them at the
            cost of what follows. Without them it is run whole.

    Raises:
        ModelError: when a site does not give what is said of it, the network gives something
            else, a weight is not finite, or the blocks do not follow one another.
    """
    if not sites:
        raise ModelError("No site is named", where=name, fix="Name one module path in sites")
    known = {site: layout for site, layout in sites.items() if layout is not None}
    size = preprocessing.size
    architecture = Architecture(
        network=network,
        forward=lambda pixels: _forward(network, pixels, final=tuple(sites)[-1], size=size),
        blocks=tuple(Block(module=_module(network, path, name)) for path in blocks),
        is_chain=bool(blocks),
        special=next(iter(known.values())).special if known else (),
        grids=tuple(dict.fromkeys(layout.grid for layout in known.values())),
        stages=tuple(sites),
        layouts=known,
        no_heads="visae knows the heads of its own families only",
    )
    model = HookedModel(
        architecture,
        identity=identify(network, name=name, title=name.rpartition("/")[2]),
        preprocessing=preprocessing,
    )
    for site in sites:
        model.layout(site)
    if blocks:
        _check_chain(model, len(blocks))
    return model


def load_custom(config: ModelConfig, device: torch.device) -> VisionModel:
    """The model that ``python:MODULE:FUNCTION`` gives, on a device if ``wrap_model`` made it.

    The module is one that can be imported, or a file of the current folder. The function takes
    nothing and says that it returns a ``VisionModel``: no other function is ever called, so that
    a store cannot name an arbitrary one.

    Raises:
        ModelError: when there is no such module or function, or it gives something else.
    """
    if config.weights is not None or config.image_size is not None or config.revision is not None:
        raise ModelError(
            "A model of your own takes no --weights, --image-size or --revision",
            where=config.model,
            fix="Let its function load the weights and say the preprocessing",
        )
    with _current_folder():
        model = _function(config.model)()
    if not isinstance(model, VisionModel):
        raise ModelError(
            f"The function gives a {type(model).__name__} instead of a VisionModel",
            where=config.model,
            fix="Return what visae.models.custom.wrap_model gives",
        )
    if not isinstance(model, HookedModel):
        return model
    model.architecture.network.to(device)
    title = config.title or model.identity.title
    return HookedModel(
        model.architecture,
        identity=dataclasses.replace(model.identity, title=title),
        preprocessing=model.preprocessing,
    )


def _forward(network: nn.Module, pixels: Tensor, *, final: str, size: tuple[int, int]) -> Output:
    """Final tokens and logits from whatever the network gives."""
    found: list[Tensor] = []

    def keep(value: Any) -> None:
        if isinstance(main(value), Tensor):
            found.append(main(value).clone())  # later modules may work in place

    with reading(network.get_submodule(final), "output", keep):
        given = network(pixels)
    if isinstance(given, Output):
        return given
    if isinstance(given, Tensor) and given.ndim == 2 and found:
        return Output(tokens=_tokens(found[-1], size), logits=given)
    return Output(tokens=_tokens(given, size), logits=None)


def _tokens(features: Any, size: tuple[int, int]) -> Tensor:
    """Tokens from tokens or a feature map."""
    if isinstance(features, Tensor) and features.ndim == 3:
        return features
    is_map = isinstance(features, Tensor) and features.ndim == 4
    form = map_form(tuple(features.shape), size, "channels first") if is_map else None
    if form is None:
        shape = f" of shape {tuple(features.shape)}" if isinstance(features, Tensor) else ""
        raise ModelError(
            f"The network gives a {type(features).__name__}{shape}",
            fix="Let it give logits, tokens, a feature map or a visae.models.protocol.Output",
        )
    return flatten(features, form)


def _module(network: nn.Module, path: str, name: str) -> nn.Module:
    modules: dict[str, nn.Module] = dict(network.named_modules())
    if path not in modules:
        raise ModelError(
            f"{name} has no module {path}",
            where="blocks",
            fix=f"Use one of: {nearest_names(path, filter(None, modules))}",
        )
    return modules[path]


def _check_chain(model: HookedModel, n_blocks: int) -> None:
    """Resume noise from the first, a middle and the last block; it must be the plain pass."""
    pixels = torch.randn(
        2, 3, *model.preprocessing.size, generator=torch.Generator().manual_seed(0)
    )
    sites = [f"residual@{index}" for index in sorted({0, n_blocks // 2, n_blocks - 1})]
    trace = model.trace(pixels, sites)
    try:
        outputs = [model.resume(trace, site, trace.tokens[site]) for site in sites]
        same = all(_same(output, trace.output) for output in outputs)
    except (RuntimeError, TypeError, ValueError):  # tensors that do not fit one another
        same = False
    if not same:
        raise ModelError(
            "These blocks do not follow one another: the network cannot be resumed from them",
            where=f"{model.identity.name}, blocks",
            fix="Name them all in the order in which they run, or leave blocks out",
        )


def _same(first: Output, second: Output) -> bool:
    pairs = zip(first, second, strict=True)
    return all(
        one is None or other is None or torch.allclose(one, other, rtol=1e-3, atol=1e-5)
        for one, other in pairs
    )


@contextlib.contextmanager
def _current_folder() -> Iterator[None]:
    """Let modules be found in the current folder too, after all others."""
    folder = str(Path.cwd())
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _function(model: str) -> Callable[[], object]:
    """The function that a name means, once it is sure that it makes a model."""
    prefix, module_name, name = (*model.split(":"), "", "")[:3]
    if prefix != "python" or not module_name or not name or model.count(":") != 2:
        raise ModelError(
            "This is not the name of a function", where=model, fix="Write python:MODULE:FUNCTION"
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as failure:
        raise ModelError(
            f"The module {module_name} cannot be imported: {failure}",
            where=model,
            fix="Install it, or go to the folder that holds it",
        ) from failure
    function = vars(module).get(name)
    if not inspect.isfunction(function):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ModelError(
            f"The module {module_name} has no function {name}",
            where=model,
            fix=f"Use one of: {nearest_names(name, functions)}",
        )
    if function.__annotations__.get("return") not in _DECLARED:
        raise ModelError(
            f"The function {name} does not say that it returns a model, so it is not called",
            where=model,
            fix="Write -> VisionModel after its arguments",
        )
    return function
