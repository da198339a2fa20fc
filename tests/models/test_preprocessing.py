import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform

from visae.errors import ConfigError, ImageError
from visae.models.preprocessing import Preprocessing
from visae.storage.records import from_plain, to_plain


def noise(height, width, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def timm_pixels(image, preprocessing):
    transform = create_transform(
        (3, *preprocessing.size),
        crop_pct=preprocessing.crop_share,
        crop_mode=preprocessing.crop,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
    )
    return transform(image).unsqueeze(0)


def assert_equals_timm(image, preprocessing):
    ours = preprocessing.pixels([preprocessing.view(image)])
    torch.testing.assert_close(ours, timm_pixels(image, preprocessing), atol=1e-6, rtol=0)


SIDES = st.integers(1, 90)


@given(SIDES, SIDES, st.integers(4, 40), st.sampled_from([1.0, 0.95, 0.9, 0.875, 0.5]))
def test_a_square_input_is_timms(height, width, side, crop_share):
    preprocessing = Preprocessing(size=(side, side), crop_share=crop_share)
    assert_equals_timm(noise(height, width), preprocessing)


@given(SIDES, SIDES, st.integers(4, 40), st.integers(4, 40), st.sampled_from([1.0, 0.9, 0.875]))
def test_a_rectangular_input_is_timms(height, width, rows, columns, crop_share):
    preprocessing = Preprocessing(size=(rows, columns), crop_share=crop_share)
    assert_equals_timm(noise(height, width), preprocessing)


@given(SIDES, SIDES, st.integers(4, 40), st.sampled_from([1.0, 0.9]))
def test_a_squashed_input_is_timms(height, width, side, crop_share):
    preprocessing = Preprocessing(size=(side, side), crop_share=crop_share, crop="squash")
    assert_equals_timm(noise(height, width), preprocessing)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_every_filter_is_timms(interpolation):
    preprocessing = Preprocessing(size=(16, 16), interpolation=interpolation)
    assert_equals_timm(noise(50, 37), preprocessing)


@pytest.mark.parametrize("size", [(375, 500), (500, 333), (224, 224), (256, 256), (257, 255)])
def test_usual_photographs_are_timms(size):
    assert_equals_timm(noise(*size), Preprocessing(size=(224, 224), crop_share=0.875))


def test_the_view_is_what_the_pixels_show():
    preprocessing = Preprocessing(size=(6, 9), crop_share=0.9, std=(0.1, 0.2, 0.3))
    view = preprocessing.view(noise(30, 40))
    assert view.size == (9, 6)
    pixels = preprocessing.pixels([view, view])
    assert pixels.shape == (2, 3, 6, 9)
    assert pixels.dtype == torch.float32
    naive = (np.asarray(view) / 255 - preprocessing.mean) / preprocessing.std
    np.testing.assert_allclose(pixels[1].permute(1, 2, 0), naive, atol=1e-5)


def test_a_view_does_not_change_the_image():
    image = noise(20, 30)
    before = image.tobytes()
    Preprocessing(size=(8, 8)).view(image)
    assert image.tobytes() == before


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1)])
def test_an_image_too_elongated_to_scale_is_refused(size):
    with pytest.raises(ImageError, match=r"too elongated.*Crop or remove it"):
        Preprocessing(size=(224, 224)).view(Image.new("RGB", size))


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": (0, 4)},
        {"size": (4, 4), "crop_share": 0.0},
        {"size": (4, 4), "crop_share": 1.1},
        {"size": (4, 4), "std": (1.0, 0.0, 1.0)},
    ],
)
def test_an_impossible_preprocessing_is_refused(wrong):
    with pytest.raises(ConfigError, match="crop_share in"):
        Preprocessing(**wrong)


@given(
    st.tuples(st.integers(1, 999), st.integers(1, 999)),
    st.floats(0.01, 1.0),
    st.sampled_from(["center", "squash"]),
)
def test_it_survives_json(size, crop_share, crop):
    preprocessing = Preprocessing(size=size, crop_share=crop_share, crop=crop)
    assert from_plain(Preprocessing, to_plain(preprocessing)) == preprocessing
