"""The ``Task`` extension point: what reads the model's output and scores classes.

The built-in task is a linear probe on the model's final tokens, trained by visae on the discovery
images and saved; it refuses another model's tokens.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from visae.errors import ExperimentError, nearest_names
from visae.models.config import ModelIdentity
from visae.models.layout import Layout
from visae.models.protocol import Output
from visae.storage.records import read_record, write_record
from visae.storage.tensors import FileRef, read_tensors, verify_file, write_tensors

__all__ = [
    "FEWEST_IMAGES",
    "LinearProbe",
    "Task",
    "class_index",
    "fit_linear_probe",
    "pool_tokens",
    "read_outcome",
]

FEWEST_IMAGES = 5
"""Images that a class needs for a probe: one for each fold of the cross-validation."""

Pool = Literal["cls", "mean-patch"]

_REGULARISATION = (0.001, 0.01, 0.1)


@runtime_checkable
class Task(Protocol):
    """Reads a model's output and gives each image a score for each class."""

    @property
    def classes(self) -> Sequence[str]:
        """Class names, in the order of the scores."""

    def logits(self, output: Output) -> Float[Tensor, "image class"]:
        """Unnormalised scores; their softmax is the probability of each class."""


def class_index(task: Task, name: str) -> int:
    """Position of a class.

    Raises:
        ExperimentError: when the task does not know it (with the nearest names).
    """
    if name not in task.classes:
        raise ExperimentError(
            f"The task knows no class {name}",
            where="outcome.class_name",
            fix=f"Use one of: {nearest_names(name, task.classes)}",
        )
    return list(task.classes).index(name)


def read_outcome(
    logits: Float[Tensor, "image class"], index: int, measure: str
) -> Float[Tensor, " image"]:
    """The measured quantity of each image, in float64."""
    scores = logits.double()
    if measure == "logit":
        return scores[:, index]
    if measure == "margin":
        others = scores.clone()
        others[:, index] = -torch.inf
        return scores[:, index] - others.max(dim=1).values
    return scores.softmax(dim=1)[:, index]


def pool_tokens(
    tokens: Float[Tensor, "image token d_out"], pool: Pool, layout: Layout
) -> Float[Tensor, "image d_out"]:
    """The CLS token, or the mean of the patches, of final tokens.

    Raises:
        ExperimentError: when the model has no CLS token.
    """
    special = layout.special if tokens.shape[1] == layout.n_tokens else ()
    if pool == "mean-patch":
        return tokens[:, len(special) :].mean(dim=1)
    if "cls" not in special:
        raise ExperimentError(
            "This model's final tokens have no CLS token",
            where="task.pool = cls",
            fix="Use pool = mean-patch",
        )
    return tokens[:, special.index("cls")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ProbeRecord:
    """The file ``probe.json``."""

    kind: str = "linear probe"
    """Always ``linear probe``."""
    format: int = 1
    """Version of this format."""
    model: ModelIdentity
    """The model whose final tokens it reads."""
    layout: Layout
    """Token layout of the model."""
    pool: Pool
    """Which final token it reads."""
    classes: tuple[str, ...]
    """Class names."""
    regularisation: float
    """Inverse strength C chosen by cross-validation."""
    accuracy: float
    """Cross-validated accuracy on the images it was trained on."""
    chance: float
    """Accuracy of always naming the largest class."""
    image_ids_digest: str
    """Hash of the content ids and labels it was trained on."""
    weights: FileRef
    """Its tensors."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """Class scores as a linear function of the pooled final tokens."""

    model: ModelIdentity
    """The model whose final tokens it reads."""
    layout: Layout
    """Token layout of the model."""
    pool: Pool
    """Which final token it reads."""
    classes: tuple[str, ...]
    """Class names."""
    weight: Float[Tensor, "class d_out"]
    """One row a class, standardisation folded in."""
    bias: Float[Tensor, " class"]
    """One number a class."""
    regularisation: float
    """Inverse strength C chosen by cross-validation."""
    accuracy: float
    """Cross-validated accuracy on the images it was trained on."""
    chance: float
    """Accuracy of always naming the largest class."""
    image_ids_digest: str
    """Hash of the content ids and labels it was trained on."""

    def logits(self, output: Output) -> Float[Tensor, "image class"]:
        """Scores of each class.

        Raises:
            ExperimentError: when the tokens have another width than those it was trained on.
        """
        if output.tokens.shape[2] != self.weight.shape[1]:
            raise ExperimentError(
                f"This probe reads tokens of width {self.weight.shape[1]}, not "
                f"{output.tokens.shape[2]}",
                where=f"probe of {self.model.name}",
                fix="Train a probe for this model",
            )
        pooled = pool_tokens(output.tokens, self.pool, self.layout)
        device = pooled.device
        return torch.nn.functional.linear(pooled, self.weight.to(device), self.bias.to(device))

    def require_model(self, identity: ModelIdentity) -> None:
        """Raise ``ExperimentError`` unless this is the model it was trained for."""
        if not self.model.same_weights(identity):
            raise ExperimentError(
                f"This probe was trained for {self.model.name} with other weights",
                where=identity.name,
                fix="Train a probe for this model",
            )

    def save(self, folder: Path) -> None:
        """Write ``probe.safetensors`` and ``probe.json``."""
        tensors = {"weight": self.weight, "bias": self.bias}
        fields = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in tensors
        }
        weights = write_tensors(folder, "probe.safetensors", tensors)
        write_record(folder / "probe.json", _ProbeRecord(weights=weights, **fields))

    @classmethod
    def load(cls, folder: Path) -> "LinearProbe":
        """Read a saved probe, checking it.

        Raises:
            ExperimentError: when it is missing, altered or newer.
        """
        record = read_record(_ProbeRecord, folder / "probe.json", error=ExperimentError)
        verify_file(folder, record.weights, error=ExperimentError)
        tensors = read_tensors(folder / record.weights.name, error=ExperimentError)
        n_rows = {name: len(tensor) for name, tensor in tensors.items()}
        if n_rows != dict.fromkeys(("weight", "bias"), len(record.classes)):
            raise ExperimentError(
                f"These weights are not those of {len(record.classes)} classes",
                where=folder,
                fix="The files belong to different probes: delete the folder",
            )
        fields: dict[str, Any] = {
            f.name: getattr(record, f.name) for f in dataclasses.fields(cls) if f.name not in n_rows
        }
        return cls(weight=tensors["weight"], bias=tensors["bias"], **fields)


def fit_linear_probe(
    features: Float[Tensor, "image d_out"],
    labels: Int64[Tensor, " image"],
    *,
    classes: Sequence[str],
    model: ModelIdentity,
    layout: Layout,
    pool: Pool,
    image_ids_digest: str,
) -> LinearProbe:
    """Multinomial logistic regression on standardised features; C by 5-fold cross-validation.

    Raises:
        ExperimentError: when a class has fewer than ``FEWEST_IMAGES`` images.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold

    counts = torch.bincount(labels, minlength=len(classes))
    if int(counts.min()) < FEWEST_IMAGES:
        worst = int(counts.argmin())
        raise ExperimentError(
            f"Class {classes[worst]} has {int(counts[worst])} discovery images",
            where="linear probe",
            fix=f"Give at least {FEWEST_IMAGES} images of every class in the discovery half",
        )
    x = features.double().numpy()
    mean, std = x.mean(0), np.maximum(x.std(0), 1e-6)
    search = GridSearchCV(
        LogisticRegression(max_iter=500, tol=1e-3),
        {"C": list(_REGULARISATION)},
        cv=StratifiedKFold(FEWEST_IMAGES, shuffle=True, random_state=0),
    )
    search.fit((x - mean) / std, labels.numpy())
    best = search.best_estimator_
    weight, bias = _class_rows(best.coef_, best.intercept_)
    return LinearProbe(
        model=model,
        layout=layout,
        pool=pool,
        classes=tuple(classes),
        weight=torch.from_numpy(weight / std).float(),
        bias=torch.from_numpy(bias - (weight / std) @ mean).float(),
        regularisation=float(search.best_params_["C"]),
        accuracy=float(search.best_score_),
        chance=float(counts.max() / counts.sum()),
        image_ids_digest=image_ids_digest,
    )


def _class_rows(
    weight: Float[np.ndarray, "row d_out"], bias: Float[np.ndarray, " row"]
) -> tuple[Float[np.ndarray, "class d_out"], Float[np.ndarray, " class"]]:
    """One row a class; two classes come as one row of differences."""
    if len(weight) > 1:
        return weight, bias
    return np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
