import logging

import pytest
import torch

from visae.errors import ConfigError
from visae.saes.kernels import choice
from visae.saes.kernels.choice import choose_kernels, fastest_encode

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger="visae.saes.kernels.choice")
    return lambda: [record.getMessage() for record in caplog.records]


def test_the_cpu_takes_the_compiled_kernels_and_says_so(said):
    kernels = choose_kernels("auto", device=CPU)
    assert kernels.name == "numba"
    assert kernels.encode == fastest_encode(CPU)
    (line,) = said()
    assert line == f"engine numba: the fastest for cpu, encode in {kernels.encode}"


def test_what_only_the_reference_can_train_goes_to_it_and_says_why(said):
    assert choose_kernels("auto", device=CPU, needs_reference="it is archetypal") is None
    assert said() == ["engine reference: it is archetypal"]


def test_the_reference_can_be_forced(said):
    assert choose_kernels("reference", device=CPU) is None
    assert said() == ["engine reference: asked for"]


def test_a_name_is_obeyed(said):
    assert choose_kernels("torch", device=CPU, encode="float32").name == "torch"
    assert said() == ["engine torch: asked for, encode in float32"]


def test_a_name_that_cannot_train_the_sae_is_refused():
    with pytest.raises(ConfigError, match=r"engine numba cannot train this SAE: it is archetypal"):
        choose_kernels("numba", device=CPU, needs_reference="it is archetypal")


@pytest.mark.parametrize(
    ("name", "device", "why"),
    [
        ("triton", CPU, "CUDA devices and the SAE is on cpu"),
        ("numba", CUDA, "the CPU and the SAE is on cuda"),
    ],
)
def test_a_name_that_cannot_run_here_is_refused(name, device, why):
    with pytest.raises(ConfigError, match=why):
        choose_kernels(name, device=device, encode="float32")


def test_a_missing_triton_is_told(monkeypatch):
    monkeypatch.setattr(choice, "_has_triton", lambda: False)
    with pytest.raises(ConfigError, match="triton is not installed"):
        choose_kernels("triton", device=CUDA, encode="float32")
    assert choose_kernels("auto", device=CUDA, encode="float32").name == "torch"


@pytest.mark.parametrize(("has_bf16", "has_amx"), [(True, False), (False, True), (False, False)])
def test_the_encode_is_in_what_the_processor_multiplies_fast(monkeypatch, has_bf16, has_amx):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    assert fastest_encode(CPU) == ("bfloat16" if has_bf16 or has_amx else "float32")
