import csv
import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visae.errors import StoreError
from visae.images.catalog import ImageTable, Skipped, write_skipped
from visae.images.splits import split_sides
from visae.storage.hashing import hash_bytes

text = st.text(st.characters(exclude_categories=["Cs"]))
rows = st.lists(st.tuples(text, text, st.none() | text, st.none() | text), max_size=5)


def table_of(*found):
    """A table of (content, ref, label, group) rows."""
    columns = list(zip(*found, strict=True)) or [()] * 4
    names = ("content_ids", "refs", "labels", "groups")
    return ImageTable(**dict(zip(names, columns, strict=True)))


@pytest.fixture
def table():
    return table_of(
        ("c1", "a.png", "owl", None),
        ("c2", "b.png", None, "g"),
        ("c1", "c.png", "cat", None),
        ("c3", "d.png", "owl", "g"),
    )


@settings(max_examples=30)
@given(found=rows)
def test_writing_and_reading_are_inverse(tmp_path_factory, found):
    path = tmp_path_factory.mktemp("table") / "images.parquet"
    table = table_of(*found)
    table.write(path)
    assert ImageTable.read(path) == table
    assert len(table) == len(found)


def test_the_file_has_the_four_columns_and_names_its_kind(table, tmp_path):
    table.write(tmp_path / "images.parquet")
    stored = pq.read_table(tmp_path / "images.parquet")
    assert stored.column_names == ["content_id", "ref", "label", "group"]
    assert stored.schema.metadata[b"visae"] == b'{"kind": "images", "format": 1}'
    assert list(tmp_path.iterdir()) == [tmp_path / "images.parquet"]


def test_class_indices_follow_the_sorted_class_names(table):
    assert table.classes == ("cat", "owl")
    np.testing.assert_array_equal(table.class_indices(), [1, -1, 0, 1])


def test_a_table_without_labels_has_no_classes():
    table = table_of(("c", "a", None, None))
    assert table.classes == ()
    np.testing.assert_array_equal(table.class_indices(), [-1])


def test_duplicates_list_the_refs_of_equal_content(table):
    assert table.duplicates() == {"c1": ("a.png", "c.png")}


def test_sides_are_those_of_split_sides(table):
    expected = split_sides(table.content_ids, table.groups, confirmation_share=0.3, salt="s")
    assert table.sides(confirmation_share=0.3, salt="s") == expected


def test_columns_of_different_lengths_are_refused(table):
    with pytest.raises(StoreError, match=r"different lengths \[3, 4\]"):
        dataclasses.replace(table, refs=("a", "b", "c"))


def damaged(path, what):
    with pytest.raises(StoreError, match=what) as caught:
        ImageTable.read(path)
    assert caught.value.fix


def test_a_missing_or_cut_table_is_refused(table, tmp_path):
    path = tmp_path / "images.parquet"
    damaged(path, "no such image table")
    table.write(path)
    path.write_bytes(path.read_bytes()[:-20])
    damaged(path, "not whole Parquet")
    path.write_text("{}")
    damaged(path, "not whole Parquet")


def test_altered_values_are_refused(tmp_path):
    path = tmp_path / "images.parquet"
    ids = [hash_bytes(bytes([i])) for i in range(50)]
    table_of(*[(content, f"{i}.png", None, None) for i, content in enumerate(ids)]).write(path)
    data = bytearray(path.read_bytes())
    data[data.index(ids[7][:8].encode())] ^= 1
    path.write_bytes(data)
    damaged(path, "not whole Parquet")


@pytest.mark.parametrize(
    "metadata",
    [None, {"visae": "{"}, {"visae": "[]"}, {"visae": '{"kind": "codes", "format": 1}'}],
    ids=str,
)
def test_another_table_is_refused(table, tmp_path, metadata):
    path = tmp_path / "images.parquet"
    table.write(path)
    stored = pq.read_table(path).replace_schema_metadata(metadata)
    pq.write_table(stored, path)
    damaged(path, "not visae's table of images")


def test_other_columns_are_refused(table, tmp_path):
    path = tmp_path / "images.parquet"
    table.write(path)
    pq.write_table(pq.read_table(path).drop_columns(["group"]), path)
    damaged(path, "not visae's table of images")


def test_a_newer_format_is_refused(table, tmp_path):
    path = tmp_path / "images.parquet"
    table.write(path)
    header = {"visae": '{"kind": "images", "format": 2}'}
    pq.write_table(pq.read_table(path).replace_schema_metadata(header), path)
    damaged(path, "Format 2 is newer")


def test_a_folder_is_no_table(tmp_path):
    damaged(tmp_path, "not whole Parquet")


def test_skipped_images_are_a_csv_with_a_header(tmp_path):
    skipped = [
        Skipped("a,b.png", "The image is truncated"),
        Skipped('q"\n.png', "The file is empty"),
    ]
    write_skipped(tmp_path / "skipped.csv", skipped)
    with (tmp_path / "skipped.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["ref", "reason"], *map(list, skipped)]


def test_no_skipped_images_leave_the_header(tmp_path):
    write_skipped(tmp_path / "skipped.csv", [])
    assert (tmp_path / "skipped.csv").read_text() == "ref,reason\n"


def test_pyarrow_reads_null_labels_as_none(table, tmp_path):
    table.write(tmp_path / "images.parquet")
    assert pq.read_table(tmp_path / "images.parquet").column("label").null_count == 1
    assert isinstance(ImageTable.read(tmp_path / "images.parquet").labels, tuple)
    assert pa.types.is_string(pq.read_schema(tmp_path / "images.parquet").field("label").type)
