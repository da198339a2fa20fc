import platform

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visae.storage.redaction import redact

STEPS = st.lists(st.text("abz09._-", min_size=1, max_size=8), min_size=1, max_size=4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/ada/photos", "photos"),
        ("/home/ada/photos/", "photos"),
        ("/home/ada love/my photos", "my photos"),
        ("~/photos", "photos"),
        ("~ada/photos", "photos"),
        ("C:\\Users\\ada\\photos", "photos"),
        ("D:/data/photos.csv", "photos.csv"),
        ("\\\\server\\share\\photos", "photos"),
        ("seg:/data/camvid?ignore=11", "seg:camvid?ignore=11"),
        ("wds:/data/train-{000..099}.tar", "wds:train-{000..099}.tar"),
        (
            "/data/labels.csv?label=name&classes=/data/names.csv",
            "labels.csv?label=name&classes=names.csv",
        ),
        ("hf:/data/saved:train", "hf:saved:train"),
        ("read from '/scratch/ada/x.tar'", "read from 'x.tar'"),
        ("python:/home/ada/models.py:build", "python:models.py:build"),
    ],
)
def test_an_absolute_path_becomes_its_last_name(text, expected):
    assert redact(text) == (expected, ("",))


@pytest.mark.parametrize(
    "text",
    [
        "photos",
        "work/photos",
        "../saes/first",
        "hf://ada/photos:train?revision=main",
        "https://example.org/a/b",
        "bundled:cifar10",
        "tokens/s",
        "residual@9",
        "open_clip/ViT-B-16/openai",
        "Ablating it lowers P(red) / P(blue)",
        "a ~ b",
        "a / b",
        "/",
        "",
    ],
)
def test_what_is_no_absolute_path_stays(text):
    assert redact(text) == (text, ())


@given(STEPS, st.sampled_from(["/", "~/", "C:\\"]))
def test_no_step_but_the_last_is_left(steps, root):
    steps = [f"q{step}q" for step in steps]
    separator = "\\" if root.endswith("\\") else "/"
    assert redact({"a": root + separator.join(steps)}).data == {"a": steps[-1]}


def test_every_changed_key_is_named():
    data = {"a": [1, "/x/y", {"b": "/z/w"}], "c": None, "/home/ada": True}
    clean, changed = redact(data)
    assert clean == {"a": [1, "y", {"b": "w"}], "c": None, "ada": True}
    assert changed == ("a[1]", "a[2].b", "/home/ada")


def test_the_name_of_the_machine_is_left_out(monkeypatch):
    monkeypatch.setattr(platform, "node", lambda: "gpu-17.lab.org")
    clean, changed = redact({"a": "made on gpu-17.lab.org", "b": "gpu-17", "c": "gpu-171"})
    assert clean == {"a": "made on machine", "b": "machine", "c": "gpu-171"}
    assert changed == ("a", "b")


def test_a_machine_with_a_common_name_changes_no_word(monkeypatch):
    monkeypatch.setattr(platform, "node", lambda: "vision")
    assert redact("a vision model") == ("a vision model", ())
