"""Scientifically rigorous interpretation of vision models with sparse autoencoders.

The eight verbs, each reading what the one before wrote: ``record``, ``train``, ``evaluate``,
``index``, ``compare``, ``intervene``, ``report``, ``serve``. Importing this module is instant:
torch and the rest are loaded when a name is first used.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS: dict[str, str] = {}

__all__ = ["__version__"]
