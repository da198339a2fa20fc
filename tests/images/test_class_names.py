import pytest

from visae.errors import ImageError
from visae.images.class_names import read_class_names


def write(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("classes.csv", "value,name\n0,sky\n11,traffic light\n"),
        ("classes.csv", "\ufeff 0 , sky\r\n\r\n11,traffic light"),
        ("classes.CSV", '0,"sky"\n11,traffic light\n'),
        ("other.json", '{"0": "sky", "11": "traffic light"}'),
    ],
)
def test_values_have_the_names_written(tmp_path, name, text):
    assert read_class_names(write(tmp_path, name, text)) == {0: "sky", 11: "traffic light"}


@pytest.mark.parametrize(
    ("name", "text"), [("classes.txt", "sky\nroad\n"), ("classes.json", '["sky", "road"]')]
)
def test_a_list_of_names_starts_at_value_0(tmp_path, name, text):
    assert read_class_names(write(tmp_path, name, text)) == {0: "sky", 1: "road"}


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("classes.csv", "0,sky\n0,road\n", "a value or a name twice"),
        ("classes.csv", "0,sky\n1,sky\n", "a value or a name twice"),
        ("classes.csv", "0,sky\n1\n", "the line 1 has 1 cells"),
        ("classes.csv", '0,"sky\n', "cannot be read"),
        ("classes.csv", "0,sky\n-1,road\n", "'-1', 'road' are no class value"),
        ("classes.csv", "0,sky\n1,\n", "'1', '' are no class value"),
        ("classes.csv", "value,name\n", "names no classes"),
        ("classes.txt", "", "names no classes"),
        ("classes.txt", "sky\n\nroad\n", "'1', '' are no class value"),
        ("classes.json", "3", "neither an object nor a list"),
        ("classes.json", "{", "cannot be read"),
        ("classes.json", "[" * 100_000, "cannot be read"),
        ("classes.yaml", "", "no file of class names"),
    ],
)
def test_what_names_no_classes_is_refused(tmp_path, name, text, what):
    with pytest.raises(ImageError, match=what) as caught:
        read_class_names(write(tmp_path, name, text))
    assert caught.value.where == str(tmp_path / name)
    assert caught.value.fix


def test_a_missing_file_or_a_folder_is_refused(tmp_path):
    with pytest.raises(ImageError, match="no such file of class names"):
        read_class_names(tmp_path / "classes.csv")
    (tmp_path / "classes.csv").mkdir()
    with pytest.raises(ImageError, match="cannot be opened: is a directory"):
        read_class_names(tmp_path / "classes.csv")


def test_another_encoding_is_refused(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_bytes("forêt".encode("latin-1"))
    with pytest.raises(ImageError, match="cannot be read"):
        read_class_names(path)
