"""The documents of the formats say what the code writes: every field, file and tensor."""

import ast
import csv
import dataclasses
import inspect
import re
import types
import typing
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors import safe_open

from visae.activations import format as store_format
from visae.activations.record import record
from visae.images.opening import open_images
from visae.models.config import ModelConfig, ModelIdentity
from visae.models.layout import Layout
from visae.models.preprocessing import Preprocessing
from visae.storage.tensors import FileRef

WHILE_INCOMPLETE = ["shards/NNNNN.safetensors", "statistics.partial.safetensors"]
STORE = (Path(__file__).parents[1] / "docs" / "formats" / "store.md").read_text(encoding="utf-8")

RECORDS = (
    *(store_format.StoreRecord, store_format.SiteRecord, Layout, ModelIdentity, Preprocessing),
    *(store_format.MaskClass, store_format.StoreContents, FileRef),
    *(store_format.ShardTable, store_format.ShardFiles, store_format.ShardRecord),
)

NAMES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def json_type(kind: typing.Any) -> str:
    """How a field's type is called in the documents."""
    if kind in NAMES:
        return NAMES[kind]
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return f"[{kind.__name__}](#{kind.__name__.lower()})"
    if origin in (types.UnionType, typing.Union, typing.Literal):
        is_value = origin is typing.Literal
        return " or ".join(f'`"{each}"`' if is_value else json_type(each) for each in inner)
    if origin is dict:
        return f"object of {many(inner[1])}"
    assert origin is tuple, kind
    if inner[-1] is Ellipsis:
        return f"list of {many(inner[0])}"
    (same,) = set(inner)
    return f"list of {len(inner)} {many(same)}"


def many(kind: typing.Any) -> str:
    """The same for several."""
    one = json_type(kind)
    if kind in NAMES:
        return f"{one}s"
    return f"({one})" if " or " in one else one


def field_docs(record: type) -> dict[str, str]:
    """The line below each field, as Markdown."""
    (body,) = ast.parse(inspect.getsource(record)).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, line in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(line, ast.Expr):
            assert isinstance(field.target, ast.Name)
            assert isinstance(line.value, ast.Constant)
            found[field.target.id] = " ".join(line.value.value.split()).replace("``", "`")
    return found


def table_of(record: type) -> str:
    """The table that the document should have."""
    docs, kinds = field_docs(record), typing.get_type_hints(record)
    rows = ["| field | JSON | what it says |", "|---|---|---|"]
    for field in dataclasses.fields(record):
        cells = f"`{field.name}`", json_type(kinds[field.name]), docs[field.name]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


@pytest.mark.parametrize("record_type", RECORDS, ids=lambda record_type: record_type.__name__)
def test_the_fields_of_a_record_are_those_of_its_dataclass(record_type):
    """Change the dataclass, and paste what this test expects into the document."""
    _, _, section = STORE.partition(f"\n### {record_type.__name__}\n")
    assert table_of(record_type) in section.partition("\n### ")[0]


def test_no_record_of_the_format_is_left_out():
    kinds = [typing.get_type_hints(record_type) for record_type in RECORDS]
    named = {kind for hints in kinds for kind in hints.values()}
    while nested := {inner for kind in named for inner in typing.get_args(kind)} - named:
        named |= nested
    assert {kind for kind in named if dataclasses.is_dataclass(kind)} <= set(RECORDS)
    _, _, sections = STORE.partition("\n## Fields of the JSON files\n")
    assert re.findall(r"^### (\w+)$", sections, re.M) == [each.__name__ for each in RECORDS]


# A store with everything in it, beside the tables of files, tensors and columns


@pytest.fixture(scope="module")
def store(tmp_path_factory, make_vit):
    """Two sites, masks, groups, metadata, a skipped image."""
    home = tmp_path_factory.mktemp("formats")
    (home / "masks").mkdir()
    generator = np.random.default_rng(0)
    rows = [("path", "label", "group", "mask", "camera")]
    for i in range(4):
        pixels = generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(home / f"{i}.png")
        Image.fromarray(pixels[..., 0] // 128).save(home / "masks" / f"{i}.png")
        rows.append((f"{i}.png", "a", "g", f"masks/{i}.png", "left"))
    (home / "names.txt").write_text("dark\nbright\n")
    (home / "3.png").write_bytes(b"no image")
    with (home / "images.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return record(
        open_images(f"{home}/images.csv?mask=mask&classes=names.txt"),
        make_vit(),
        home / "store",
        config=store_format.RecordConfig(sites=("residual@0", "mlp@0"), tokens="all"),
        model_config=ModelConfig(model="tiny"),
    )


def rows_below(heading: str) -> list[list[str]]:
    """The cells of the table below a heading, its first column without backticks."""
    _, _, section = STORE.partition(f"\n### {heading}\n")
    lines = [line for line in section.partition("\n#")[0].splitlines() if line.startswith("| `")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


def matches(pattern: str, name: str) -> bool:
    """Whether a name is one of those that a name of the document stands for."""
    parts = re.split(r"(SITE|NNNNN|KIND|RxC|NAME)", pattern)
    stands_for = {
        "SITE": r"[^/]+",
        "NNNNN": r"\d{5}",
        "KIND": "(?:special|patches)",
        "RxC": r"\d+x\d+",
        "NAME": ".+",
    }
    return bool(re.fullmatch("".join(stands_for.get(p) or re.escape(p) for p in parts), name))


def test_the_files_of_a_store_are_those_of_the_document(store):
    found = {p.relative_to(store.folder).as_posix() for p in store.folder.rglob("*") if p.is_file()}
    patterns = [row[0] for row in rows_below("Files")]
    assert {name for name in found if not any(matches(p, name) for p in patterns)} == set()
    unseen = [pattern for pattern in patterns if not any(matches(pattern, name) for name in found)]
    assert unseen == WHILE_INCOMPLETE


def test_the_tensors_of_a_store_are_those_of_the_document(store):
    """Names, number formats and number of dimensions."""
    documented = rows_below("Tensors")
    seen = set()
    for path in store.folder.rglob("*.safetensors"):
        file_name = path.relative_to(store.folder).as_posix()
        with safe_open(path, framework="pt") as file:
            for tensor_name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(tensor_name)
                rows = [
                    row
                    for row in documented
                    if matches(row[0], file_name) and matches(row[1], tensor_name)
                ]
                assert len(rows) == 1, (file_name, tensor_name)
                _, name, dtypes, shape, *_ = rows[0]
                assert str(tensor.dtype).removeprefix("torch.") in dtypes, name
                assert len(shape.strip("()").split(", ")) == tensor.ndim or shape == "()", name
                seen.add((rows[0][0], name))
    assert seen == {(row[0], row[1]) for row in documented if row[0] not in WHILE_INCOMPLETE}


def test_the_columns_of_the_image_table_are_those_of_the_document(store):
    documented = [row[0] for row in rows_below("Columns")]
    found = pq.read_schema(store.folder / "images.parquet").names
    for name in found:
        assert any(matches(pattern, name) for pattern in documented), name
    for pattern in documented:
        assert any(matches(pattern, name) for name in found), pattern
