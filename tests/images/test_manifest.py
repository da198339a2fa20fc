import datetime as dt

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from visae.errors import ImageError
from visae.images.manifest import ManifestImages, ManifestOptions
from visae.images.opening import open_images
from visae.images.source import ImageEntry, ImageSource, MaskedSource
from visae.storage.hashing import hash_file


@pytest.fixture
def folder(tmp_path, write_image):
    for i, ref in enumerate(("a.png", "b.png", "sub/c.png", "sub/d.png")):
        write_image(tmp_path / ref, seed=i)
    return tmp_path


def write_csv(folder, text, *, encoding="utf-8"):
    path = folder / "labels.csv"
    path.write_bytes(text.encode(encoding))
    return path


def write_parquet(folder, columns):
    path = folder / "labels.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def failure(manifest, **options):
    with pytest.raises(ImageError) as caught:
        ManifestImages(manifest, ManifestOptions(**options))
    return str(caught.value)


def test_a_csv_gives_entries_in_the_order_of_its_rows(folder):
    path = write_csv(
        folder,
        "path,label,group,camera\nsub/c.png,cat,p1,left\na.png,,,right\n\nb.png,007,p2,\n",
    )
    source = ManifestImages(path)
    assert isinstance(source, ImageSource)
    assert source.entries == (
        ImageEntry(ref="sub/c.png", label="cat", group="p1", metadata={"camera": "left"}),
        ImageEntry(ref="a.png", label=None, group=None, metadata={"camera": "right"}),
        ImageEntry(ref="b.png", label="007", group="p2", metadata={"camera": None}),
    )
    assert source.load("a.png").content_id == hash_file(folder / "a.png")


def test_a_parquet_table_is_read_alike_with_values_as_text(folder):
    columns = {
        "file": ["a.png", "b.png", "sub/c.png"],
        "class": pa.array(["cat", "owl", None]).dictionary_encode(),
        "group": [7, None, 8],
        "age": [1.5, 2.5, 3.5],
        "day": [dt.date(2024, 1, 31), None, None],
        "box": [[1, 2], [3], []],
    }
    source = ManifestImages(write_parquet(folder, columns))
    assert [(e.ref, e.label, e.group) for e in source.entries] == [
        ("a.png", "cat", "7"),
        ("b.png", "owl", None),
        ("sub/c.png", None, "8"),
    ]
    assert [dict(entry.metadata) for entry in source.entries] == [
        {"age": "1.5", "day": "2024-01-31"},
        {"age": "2.5", "day": None},
        {"age": "3.5", "day": None},
    ]


def test_a_missing_number_is_an_empty_cell(folder):
    path = write_parquet(folder, {"path": ["a.png", "b.png"], "label": [1.0, float("nan")]})
    assert [entry.label for entry in ManifestImages(path).entries] == ["1.0", None]


def test_columns_and_root_are_chosen_by_options(folder):
    path = write_csv(folder, "file,wnid,name,place\nc.png,n01,tench,a\nd.png,n02,goldfish,b\n")
    source = ManifestImages(path, ManifestOptions(root="sub", label="name", group="place"))
    assert [(e.ref, e.label, e.group) for e in source.entries] == [
        ("c.png", "tench", "a"),
        ("d.png", "goldfish", "b"),
    ]
    assert [dict(entry.metadata) for entry in source.entries] == [{"wnid": "n01"}, {"wnid": "n02"}]
    assert source.load("c.png").content_id == hash_file(folder / "sub/c.png")
    assert source.location == f"{path.as_posix()}?root=sub&label=name&group=place"


def test_a_column_called_name_is_not_taken_for_the_label(folder):
    path = write_csv(folder, "file,name\na.png,tench\n")
    assert ManifestImages(path).entries == (
        ImageEntry(ref="a.png", label=None, metadata={"name": "tench"}),
    )


def test_one_column_may_serve_twice(folder):
    path = write_csv(folder, "path,label\na.png,x\n")
    (entry,) = ManifestImages(path, ManifestOptions(group="label")).entries
    assert (entry.label, entry.group) == ("x", "x")


def test_a_byte_order_mark_and_spaces_in_the_header_do_no_harm(folder):
    path = write_csv(folder, "\ufeffpath , label\r\na.png,cat\r\n")
    assert ManifestImages(path).entries == (ImageEntry(ref="a.png", label="cat"),)


def test_paths_may_be_absolute_or_lead_out_of_the_folder_of_the_manifest(folder, write_image):
    inner = folder / "tables"
    inner.mkdir()
    path = write_csv(inner, f"path\n../a.png\n{folder}/b.png\n./../sub/c.png\n")
    source = ManifestImages(path)
    expected = [hash_file(folder / name) for name in ("a.png", "b.png", "sub/c.png")]
    assert [source.load(entry.ref).content_id for entry in source.entries] == expected


def test_a_missing_file_is_listed_and_fails_when_loaded(folder):
    source = ManifestImages(write_csv(folder, "path\na.png\ngone.png\n"))
    assert len(source.entries) == 2
    with pytest.raises(ImageError, match="The file is missing"):
        source.load("gone.png")


def test_a_ref_that_is_not_listed_is_refused(folder):
    source = ManifestImages(write_csv(folder, "path\na.png\n"))
    with pytest.raises(ImageError, match="does not list this image"):
        source.load("b.png")


def test_paths_that_start_elsewhere_are_refused_with_the_root_to_use(folder):
    path = write_csv(folder, "path\nc.png\nd.png\n")
    assert "Say where the paths start with ?root=sub," in failure(path)


def test_paths_that_are_nowhere_are_refused(folder):
    path = write_csv(folder, "path\nnowhere.png\n")
    assert "None of the first 1 paths" in failure(path)
    assert "?root=FOLDER" in failure(path)


def test_a_root_that_is_missing_names_the_nearest(folder):
    path = write_csv(folder, "path\nc.png\n")
    assert "holds: sub" in failure(path, root="sup")


def test_no_path_column_names_the_nearest(folder):
    message = failure(write_csv(folder, "paths,label\na.png,x\n"))
    assert "no column path, file or image" in message
    assert "?path=COLUMN" in message
    assert "paths" in message


@pytest.mark.parametrize("option", ["path", "label", "group"])
def test_a_column_that_was_asked_for_and_is_missing_names_the_nearest(folder, option):
    path = write_csv(folder, "path,species\na.png,x\n")
    message = failure(path, **{option: "specie"})
    assert "no column 'specie'" in message
    assert "columns: species" in message


@pytest.mark.parametrize("second", ["a.png", "./a.png", "sub/../a.png"])
def test_a_path_that_occurs_twice_is_refused(folder, second):
    message = failure(write_csv(folder, f"path\na.png\nb.png\n{second}\n"))
    assert "Rows 1 and 3 name the same path" in message


@pytest.mark.parametrize("text", ["", "path,label\n", "\n"])
def test_an_empty_manifest_is_refused(folder, text):
    assert "This manifest has no rows" in failure(write_csv(folder, text))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path,label\na.png,x\nb.png\n", "Line 3 has 1 cells, the header 2"),
        ('path\n"a.png\n', "not valid CSV"),
        ("path,label,label\na.png,x,y\n", "names a column twice"),
        ("path,label\n,x\n", "Row 1 has no path"),
    ],
)
def test_a_broken_csv_says_where(folder, text, words):
    assert words in failure(write_csv(folder, text))


def test_another_encoding_is_refused(folder):
    path = write_csv(folder, "path,label\na.png,hélice\n", encoding="latin-1")
    assert "not UTF-8 text" in failure(path)


def test_a_broken_parquet_file_is_refused(folder):
    path = write_parquet(folder, {"path": ["a.png"]})
    path.write_bytes(path.read_bytes()[:-9])
    assert "not valid Parquet" in failure(path)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_folder_or_nothing_under_the_name_is_refused(folder, suffix):
    (folder / f"folder{suffix}").mkdir()
    assert "cannot be opened" in failure(folder / f"folder{suffix}")
    assert f"holds: folder{suffix}" in failure(folder / f"foldr{suffix}")


@pytest.mark.parametrize("name", ["path", "label"])
def test_a_column_of_another_kind_is_refused(folder, name):
    columns = {"path": ["a.png"], "label": ["x"], name: [["a.png"]]}
    assert f"Column '{name}' holds list" in failure(write_parquet(folder, columns))


def test_a_table_with_images_inside_is_pointed_to_hf(folder):
    path = write_parquet(folder, {"image": [{"bytes": b"x", "path": "a.png"}]})
    assert "hf:FOLDER" in failure(path)


def test_several_group_columns_join_images_that_share_any_value(folder):
    rows = "path,patient,site\na.png,p1,s1\nb.png,p2,s1\nsub/c.png,p2,\nsub/d.png,,\n"
    source = open_images(f"{write_csv(folder, rows)}?group=patient,site")
    assert [entry.group for entry in source.entries] == ["patient=p1"] * 3 + [None]
    assert source.entries[1].metadata == {"patient": "p2", "site": "s1"}
    assert open_images(source.location).entries == source.entries


@pytest.fixture
def masked(folder):
    """A manifest of two images, the first with a mask of values 0, 1 and 9."""
    values = np.array([[0, 0, 1, 1], [0, 9, 9, 1], [9, 9, 9, 9]], np.uint8)
    Image.fromarray(values).save(folder / "sub/m.png")
    return write_csv(folder, "path,label,seg\na.png,x,sub/m.png\nb.png,y,\n"), values


def test_a_column_of_masks_gives_masks(masked, folder, sent):
    path, values = masked
    (folder / "names.json").write_text('{"0": "sky", "1": "road"}')
    source = open_images(f"{path}?mask=seg&classes=names.json&ignore=9")
    assert isinstance(source, MaskedSource)
    assert source.mask_classes == {0: "sky", 1: "road"}
    assert source.entries[0] == ImageEntry(ref="a.png", label="x")
    image = source.load("a.png")
    np.testing.assert_array_equal(
        np.asarray(image.mask), np.where(values == 9, -1, values.astype(int))
    )
    assert image.mask_id == hash_file(folder / "sub/m.png")
    without = source.load("b.png")
    assert (without.mask, without.mask_id) == (None, None)
    assert without.content_id == hash_file(folder / "b.png")
    again = open_images(sent(source).location)
    assert (again.entries, again.mask_classes) == (source.entries, source.mask_classes)
    np.testing.assert_array_equal(np.asarray(again.load("a.png").mask), np.asarray(image.mask))


def test_without_a_column_of_masks_there_are_none(masked):
    assert not isinstance(open_images(masked[0]), MaskedSource)
    with pytest.raises(ImageError, match=r"Name the masks with \?mask="):
        open_images(f"{masked[0]}?ignore=9")


def test_a_column_of_masks_that_is_missing_is_refused(masked):
    with pytest.raises(ImageError, match="no column 'mask'"):
        open_images(f"{masked[0]}?mask=mask")
