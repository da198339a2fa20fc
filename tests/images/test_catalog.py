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
from visae.images.source import ImageEntry
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


@settings(max_examples=30)
@given(names=st.lists(text, unique=True, max_size=3), data=st.data())
def test_masks_and_metadata_are_written_and_read(tmp_path_factory, names, data):
    cells = st.tuples(*[st.none() | text] * 3)
    table = dataclasses.replace(
        table_of(*[(f"c{i}", f"{i}.png", None, None) for i in range(3)]),
        mask_ids=data.draw(st.just(()) | cells),
        metadata={name: data.draw(cells) for name in names},
    )
    path = tmp_path_factory.mktemp("table") / "images.parquet"
    table.write(path)
    found = ImageTable.read(path)
    assert found == table
    assert list(found.metadata) == names


def test_a_table_of_images_that_were_read():
    entries = [
        ImageEntry(ref="a.png", label="owl", metadata={"site": "x", "label": "y"}),
        ImageEntry(ref="b.png", group="g", metadata={"site": None, "label": "z"}),
    ]
    table = ImageTable.of(zip(entries, ["c1", "c2"], [None, "m"], strict=True))
    assert table.content_ids == ("c1", "c2")
    assert table.mask_ids == (None, "m")
    assert table.metadata == {"site": ("x", None), "label": ("y", "z")}
    assert [table.entry(row) for row in (0, 1)] == entries
    assert ImageTable.of([(entries[0], "c1", None)]).mask_ids == ()


def test_rows_are_taken_with_all_their_columns(table):
    full = dataclasses.replace(
        table, mask_ids=("m0", None, "m2", "m3"), metadata={"site": ("s0", "s1", "s2", "s3")}
    )
    taken = full.take([2, 0])
    assert (taken.content_ids, taken.refs) == (("c1", "c1"), ("c.png", "a.png"))
    assert (taken.labels, taken.groups) == (("cat", "owl"), (None, None))
    assert (taken.mask_ids, taken.metadata) == (("m2", "m0"), {"site": ("s2", "s0")})
    assert table.take([]) == ImageTable.of([])


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
    three = ("a", "b", "c")
    for wrong in ({"refs": three}, {"mask_ids": three}, {"metadata": {"site": three}}):
        with pytest.raises(StoreError, match=r"different lengths \[3, 4\]"):
            dataclasses.replace(table, **wrong)


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


@pytest.mark.parametrize("name", ["site", "mask_ids", "metadatum.site"])
def test_unknown_columns_are_refused(table, tmp_path, name):
    path = tmp_path / "images.parquet"
    table.write(path)
    stored = pq.read_table(path)
    pq.write_table(stored.append_column(name, stored.column("label")), path)
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
