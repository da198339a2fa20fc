"""The document of the SAE's format says what the code writes: every field, file and tensor."""

import ast
import dataclasses
import inspect
import re
import types
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from visae.models.config import ModelIdentity
from visae.models.layout import Layout
from visae.models.preprocessing import Preprocessing
from visae.saes.checkpoint import Provenance, SAERecord, load_sae, save_sae
from visae.saes.config import SAEConfig
from visae.saes.learned import Gated, JumpReLU
from visae.saes.sae import SAE
from visae.saes.sparsity import BatchTopK, ReLU, TopK
from visae.storage.tensors import FileRef

PAGE = (Path(__file__).parents[1] / "docs" / "formats" / "sae.md").read_text(encoding="utf-8")

KINDS = (BatchTopK, TopK, JumpReLU, ReLU, Gated)
RECORDS = (SAERecord, Provenance, *KINDS)
ELSEWHERE = (ModelIdentity, Layout, Preprocessing, FileRef)  # compared by the store's document

NAMES = {str: "string", int: "integer", float: "number", type(None): "null", bool: "boolean"}


def json_type(kind: Any) -> str:
    """How a field's type is called in the document."""
    if kind in NAMES:
        return NAMES[kind]
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        page = "store.md" if kind in ELSEWHERE else ""
        return f"[{kind.__name__}]({page}#{kind.__name__.lower()})"
    if origin in (types.UnionType, typing.Union, typing.Literal):
        is_value = origin is typing.Literal
        return " or ".join(f'`"{each}"`' if is_value else json_type(each) for each in inner)
    if origin is dict:
        return "object" if inner[1] is Any else f"object of {json_type(inner[1])}s"
    assert origin is tuple
    assert inner[-1] is Ellipsis
    return f"list of {json_type(inner[0])}s"


def table_of(record: type) -> str:
    """The table that the document should have."""
    (body,) = ast.parse(inspect.getsource(record)).body
    assert isinstance(body, ast.ClassDef)
    said = {}
    for field, line in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(line, ast.Expr):
            assert isinstance(field.target, ast.Name)
            assert isinstance(line.value, ast.Constant)
            said[field.target.id] = " ".join(str(line.value.value).split()).replace("``", "`")
    kinds = typing.get_type_hints(record)
    rows = ["| field | JSON | what it says |", "|---|---|---|"]
    rows += [
        f"| `{field.name}` | {json_type(kinds[field.name])} | {said[field.name]} |"
        for field in dataclasses.fields(record)
    ]
    return "\n".join(rows)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
def test_the_fields_of_a_record_are_those_of_its_dataclass(record):
    """Change the dataclass, and paste what this test expects into the document."""
    _, _, section = PAGE.partition(f"\n### {record.__name__}\n")
    assert table_of(record) in section.partition("\n### ")[0]


def test_no_record_of_the_format_is_left_out():
    named = {kind for record in RECORDS for kind in typing.get_type_hints(record).values()}
    while nested := {inner for kind in named for inner in typing.get_args(kind)} - named:
        named |= nested
    found = {kind for kind in named if dataclasses.is_dataclass(kind)}
    assert found <= {*RECORDS, *ELSEWHERE}
    _, _, sections = PAGE.partition("\n## Fields of sae.json\n")
    assert re.findall(r"^### (\w+)$", sections, re.M) == [each.__name__ for each in RECORDS]


def test_the_format_has_the_number_of_the_code():
    assert PAGE.startswith(f"# The SAE checkpoint, format {SAERecord.format}\n")


# Checkpoints of every kind, beside the tables of files and tensors


def provenance() -> Provenance:
    return Provenance(
        model=ModelIdentity(name="tiny", title="Tiny", weights_sha256="0" * 64),
        site="residual@1",
        layout=Layout(special=("cls",), grid=(2, 3)),
        preprocessing=Preprocessing(size=(8, 12)),
        tokens="patches",
        store_digest="1" * 64,
        n_tokens=0,
        seed=0,
        control="none",
        recipe={},
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One checkpoint of each kind; the last is a transcoder."""
    home = tmp_path_factory.mktemp("saes")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(70, 6, generator=generator)
    made = []
    for index, kind in enumerate((*KINDS, ReLU)):
        config = SAEConfig(d_model=6, n_features=64, sparsity=kind(), transcoder=index == 5)
        sae = SAE(config)
        with torch.no_grad():
            for parameter in sae.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            sae.threshold.fill_(0.4)
        folder = home / f"{index}"
        save_sae(sae, folder, provenance=provenance(), reference=x, metrics={})
        made.append(folder)
    return made


def rows_below(heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without backticks."""
    _, _, section = PAGE.partition(f"\n### {heading}\n")
    lines = [line for line in section.partition("\n#")[0].splitlines() if line.startswith("| `")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


def test_the_files_are_those_of_the_document(folders):
    found = {path.name for folder in folders for path in folder.iterdir()}
    assert found <= {row[0] for row in rows_below("Files")}
    assert found >= {"sae.json", "sae.safetensors"}


def test_the_tensors_are_those_of_the_document(folders):
    """Names, number formats and shapes."""
    documented = {row[0]: row for row in rows_below("Tensors")}
    sizes = {"feature": 64, "d_model": 6, "token": 64, "token + 1": 65}
    seen = set()
    for folder in folders:
        with safe_open(folder / "sae.safetensors", framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                _, dtype, shape, *_ = documented[name]
                assert str(tensor.dtype) == f"torch.{dtype}", name
                axes = [axis for axis in shape.strip("()").split(", ") if axis]
                assert len(axes) == tensor.ndim, name
                for axis, size in zip(axes, tensor.shape, strict=True):
                    assert axis == "entry" or sizes[axis] == size, name
                seen.add(name)
    assert seen == set(documented)


def test_the_reading_example_gives_the_codes_of_the_library(folders, tmp_path, monkeypatch):
    """What a stranger computes from the document is what ``load_sae`` computes."""
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    for folder in folders:
        monkeypatch.chdir(folder)
        names: dict[str, Any] = {}
        exec(compile(code.replace("saes/first", "."), "sae.md", "exec"), names)  # noqa: S102
        sae = load_sae(folder)
        torch.testing.assert_close(names["f"], sae.encode(names["x"]))
        torch.testing.assert_close(names["given"], sae(names["x"]))
        assert (names["f"] > 0).any()
