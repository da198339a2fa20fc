"""Shared set-up: no network, two threads, the same random examples on every run."""

import os

from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

# Read when torch, numpy and numba are first imported: sums come out the same on every machine.
for library in ("OMP", "MKL", "OPENBLAS", "NUMBA"):
    os.environ[f"{library}_NUM_THREADS"] = "2"

settings.register_profile("visae", deadline=None, derandomize=True)
settings.load_profile("visae")
