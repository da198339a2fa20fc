"""Which back end trains an SAE: chosen by what the machine has, or forced by name."""

import importlib.util
import logging
from collections.abc import Callable
from typing import Literal

import torch

from visae.errors import ConfigError
from visae.saes.kernels.compiled import NumbaKernels
from visae.saes.kernels.interface import Encode, Keep, Kernels
from visae.saes.learned import AnySparsity
from visae.saes.sparsity import BatchTopK, TopK

__all__ = ["EngineName", "choose_kernels", "fastest_encode", "keep_of"]

EngineName = Literal["auto", "reference", "torch", "numba", "triton"]
"""``reference`` is dense autograd, for every kind; the others are back ends of the engine."""

_log = logging.getLogger(__name__)


def keep_of(sparsity: AnySparsity) -> Keep:
    """What a sparsity kind keeps, in the engine's terms.

    Raises:
        ConfigError: when the kind does not keep a fixed number.
    """
    if isinstance(sparsity, TopK):
        return Keep(k=sparsity.k, over="token")
    if isinstance(sparsity, BatchTopK):
        return Keep(k=sparsity.k, over="batch")
    raise ConfigError(
        f"The sparse engine does not train sparsity {sparsity.kind}",
        where="engine",
        fix="Choose TopK or BatchTopK, or the engine reference",
    )


def fastest_encode(device: torch.device) -> Encode:
    """Bfloat16 where the device multiplies it in hardware, else float32."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    has_units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if has_units else "float32"


def choose_kernels(
    name: EngineName,
    *,
    device: torch.device,
    needs_reference: str = "",
    encode: Encode | None = None,
) -> Kernels | None:
    """The back end for one SAE, or None for the reference engine; says in the log which and why.

    Args:
        name: A back end, or ``auto``.
        device: Where the SAE lies.
        needs_reference: Why only the reference engine can train it; empty if any can.
        encode: Precision of the encode; by default the faster one of the device.

    Raises:
        ConfigError: when the named back end cannot run here, or cannot train this SAE.
    """
    if name == "reference" or (name == "auto" and needs_reference):
        _log.info("engine reference: %s", needs_reference or "asked for")
        return None
    if needs_reference:
        raise ConfigError(
            f"The engine {name} cannot train this SAE: {needs_reference}",
            where="engine",
            fix="Give auto or reference",
        )
    fitting: EngineName = "triton" if device.type == "cuda" and _has_triton() else "torch"
    fitting = "numba" if device.type == "cpu" else fitting
    chosen = fitting if name == "auto" else name
    kernels = _MAKERS[chosen](device, encode or fastest_encode(device))
    why = "asked for" if name != "auto" else f"the fastest for {device.type}"
    _log.info("engine %s: %s, encode in %s", chosen, why, kernels.encode)
    return kernels


def _numba(device: torch.device, encode: Encode) -> Kernels:
    if device.type != "cpu":
        raise _unavailable("numba", f"it works on the CPU and the SAE is on {device}")
    return NumbaKernels(encode=encode)


def _torch(device: torch.device, encode: Encode) -> Kernels:
    from visae.saes.kernels.plain import TorchKernels

    return TorchKernels(encode=encode)


def _triton(device: torch.device, encode: Encode) -> Kernels:
    if device.type != "cuda":
        raise _unavailable("triton", f"it works on CUDA devices and the SAE is on {device}")
    if not _has_triton():
        raise _unavailable("triton", "the package triton is not installed")
    from visae.saes.kernels.triton_kernels import TritonKernels

    return TritonKernels(encode=encode)


_MAKERS: dict[str, Callable[[torch.device, Encode], Kernels]] = {
    "numba": _numba,
    "torch": _torch,
    "triton": _triton,
}


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _unavailable(name: str, why: str) -> ConfigError:
    return ConfigError(
        f"The engine {name} cannot run here: {why}", where="engine", fix="Give auto or torch"
    )
