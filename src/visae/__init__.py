"""Scientifically rigorous interpretation of vision models with sparse autoencoders.

The eight verbs, each reading what the one before wrote: ``record``, ``train``, ``evaluate``,
``index``, ``compare``, ``intervene``, ``report``, ``serve``. Importing this module is instant:
torch and the rest are loaded when a name is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visae.activations.format import RecordConfig as RecordConfig
    from visae.activations.live import LiveTokens as LiveTokens
    from visae.activations.loaders import OrderedTokens as OrderedTokens
    from visae.activations.loaders import ShuffledTokens as ShuffledTokens
    from visae.activations.opening import open_store as open_store
    from visae.activations.record import record as record
    from visae.activations.store import ActivationStore as ActivationStore
    from visae.activations.token_filter import TokenFilter as TokenFilter
    from visae.distributed import joined_ranks as joined_ranks
    from visae.errors import VisaeError as VisaeError
    from visae.evaluation.card import evaluate as evaluate
    from visae.features.build import build_index as build_index
    from visae.features.config import IndexConfig as IndexConfig
    from visae.features.index import FeatureIndex as FeatureIndex
    from visae.images.opening import open_images as open_images
    from visae.images.source import ImageSource as ImageSource
    from visae.interventions.experiment import run_experiment as run_experiment
    from visae.interventions.spec import BestForClass as BestForClass
    from visae.interventions.spec import ExperimentSpec as ExperimentSpec
    from visae.interventions.spec import FixedFeature as FixedFeature
    from visae.interventions.spec import OutcomeConfig as OutcomeConfig
    from visae.interventions.spec import read_spec as read_spec
    from visae.interventions.tasks import Task as Task
    from visae.interventions.verdict import Prediction as Prediction
    from visae.models.config import ModelConfig as ModelConfig
    from visae.models.custom import wrap_model as wrap_model
    from visae.models.layout import Layout as Layout
    from visae.models.loading import load_model as load_model
    from visae.models.loading import load_text_tower as load_text_tower
    from visae.models.preprocessing import Preprocessing as Preprocessing
    from visae.models.protocol import TextTower as TextTower
    from visae.models.protocol import VisionModel as VisionModel
    from visae.reports.push import PushConfig as PushConfig
    from visae.reports.push import push_sae as push_sae
    from visae.reports.workspace import write_report as write_report
    from visae.saes.checkpoint import load_sae as load_sae
    from visae.saes.codes import SparseCodes as SparseCodes
    from visae.saes.config import ArchetypesConfig as ArchetypesConfig
    from visae.saes.learned import Gated as Gated
    from visae.saes.learned import JumpReLU as JumpReLU
    from visae.saes.pull import pull_sae as pull_sae
    from visae.saes.sae import SAE as SAE
    from visae.saes.sparsity import BatchTopK as BatchTopK
    from visae.saes.sparsity import ReLU as ReLU
    from visae.saes.sparsity import Sparsity as Sparsity
    from visae.saes.sparsity import TopK as TopK
    from visae.training.choosing import ChoiceRule as ChoiceRule
    from visae.training.config import RunConfig as RunConfig
    from visae.training.config import TrainConfig as TrainConfig
    from visae.training.loop import train as train
    from visae.training.loop import train_on as train_on
    from visae.training.sweep import train_sweep as train_sweep
    from visae.training.sweep_config import RunSettings as RunSettings
    from visae.training.sweep_config import SweepConfig as SweepConfig
    from visae.training.sweep_config import read_sweep as read_sweep
    from visae.training.sweep_results import SweepResult as SweepResult

__version__ = "0.1.0"

_HOMES = {
    "ActivationStore": "activations.store",
    "ArchetypesConfig": "saes.config",
    "BatchTopK": "saes.sparsity",
    "BestForClass": "interventions.spec",
    "ChoiceRule": "training.choosing",
    "ExperimentSpec": "interventions.spec",
    "FeatureIndex": "features.index",
    "FixedFeature": "interventions.spec",
    "Gated": "saes.learned",
    "ImageSource": "images.source",
    "IndexConfig": "features.config",
    "JumpReLU": "saes.learned",
    "Layout": "models.layout",
    "LiveTokens": "activations.live",
    "ModelConfig": "models.config",
    "OrderedTokens": "activations.loaders",
    "OutcomeConfig": "interventions.spec",
    "Prediction": "interventions.verdict",
    "Preprocessing": "models.preprocessing",
    "PushConfig": "reports.push",
    "ReLU": "saes.sparsity",
    "RecordConfig": "activations.format",
    "RunConfig": "training.config",
    "RunSettings": "training.sweep_config",
    "SAE": "saes.sae",
    "ShuffledTokens": "activations.loaders",
    "SparseCodes": "saes.codes",
    "Sparsity": "saes.sparsity",
    "SweepConfig": "training.sweep_config",
    "SweepResult": "training.sweep_results",
    "Task": "interventions.tasks",
    "TextTower": "models.protocol",
    "TokenFilter": "activations.token_filter",
    "TopK": "saes.sparsity",
    "TrainConfig": "training.config",
    "VisaeError": "errors",
    "VisionModel": "models.protocol",
    "build_index": "features.build",
    "evaluate": "evaluation.card",
    "joined_ranks": "distributed",
    "load_model": "models.loading",
    "load_sae": "saes.checkpoint",
    "load_text_tower": "models.loading",
    "open_images": "images.opening",
    "open_store": "activations.opening",
    "pull_sae": "saes.pull",
    "push_sae": "reports.push",
    "read_spec": "interventions.spec",
    "read_sweep": "training.sweep_config",
    "record": "activations.record",
    "run_experiment": "interventions.experiment",
    "train": "training.loop",
    "train_on": "training.loop",
    "train_sweep": "training.sweep",
    "wrap_model": "models.custom",
    "write_report": "reports.workspace",
}

__all__ = [
    "SAE",
    "ActivationStore",
    "ArchetypesConfig",
    "BatchTopK",
    "BestForClass",
    "ChoiceRule",
    "ExperimentSpec",
    "FeatureIndex",
    "FixedFeature",
    "Gated",
    "ImageSource",
    "IndexConfig",
    "JumpReLU",
    "Layout",
    "LiveTokens",
    "ModelConfig",
    "OrderedTokens",
    "OutcomeConfig",
    "Prediction",
    "Preprocessing",
    "PushConfig",
    "ReLU",
    "RecordConfig",
    "RunConfig",
    "RunSettings",
    "ShuffledTokens",
    "SparseCodes",
    "Sparsity",
    "SweepConfig",
    "SweepResult",
    "Task",
    "TextTower",
    "TokenFilter",
    "TopK",
    "TrainConfig",
    "VisaeError",
    "VisionModel",
    "__version__",
    "build_index",
    "evaluate",
    "joined_ranks",
    "load_model",
    "load_sae",
    "load_text_tower",
    "open_images",
    "open_store",
    "pull_sae",
    "push_sae",
    "read_spec",
    "read_sweep",
    "record",
    "run_experiment",
    "train",
    "train_on",
    "train_sweep",
    "wrap_model",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its home when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'visae' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"visae.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
