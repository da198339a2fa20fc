import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from visae.errors import ImageError
from visae.images.decode import Decoded, decode_oriented
from visae.images.mask_decode import decode_mask

ORIENTATIONS = range(2, 9)


def values_of(data, size, *, orientation=1, **options):
    """The decoded values of a mask of a (height, width) image."""
    image = Decoded(Image.new("RGB", size[::-1]), orientation)
    return decode_mask(data, image, where="it", **options)


def refused(data, size, what, **options):
    with pytest.raises(ImageError, match=what) as caught:
        values_of(data, size, **options)
    assert caught.value.where == "mask of it"
    assert caught.value.fix


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("depth", ["palette", "8 bits", "16 bits"])
def test_values_are_those_stored_whatever_colours_they_show_as(encode, kind, depth):
    values = np.array([[0, 1, 2], [7, 11, 255]], np.uint16 if depth == "16 bits" else np.uint8)
    mask = Image.fromarray(values)
    if depth == "palette":
        mask.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
        assert mask.mode == "P"
    found = values_of(encode(mask, kind), (2, 3))
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, values)


def test_high_values_of_16_bits_survive(encode):
    values = np.array([[0, 300, 65_535]], np.uint16)
    np.testing.assert_array_equal(values_of(encode(Image.fromarray(values)), (1, 3)), values)


def grey_png(rows, bits):
    """A grey PNG of few bits a pixel, packed by hand."""

    def chunk(name, data):
        crc = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)

    packed = b""
    for row in rows:
        text = "".join(f"{value:0{bits}b}" for value in row)
        text += "0" * (-len(text) % 8)
        packed += b"\0" + bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))
    header = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], bits, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(packed)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@given(st.sampled_from([1, 2, 4, 8]), st.data())
def test_grey_of_few_bits_is_not_spread_over_the_range(bits, data):
    size = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 9)))
    rows = data.draw(arrays(np.uint8, size, elements=st.integers(0, 2**bits - 1)))
    np.testing.assert_array_equal(values_of(grey_png(rows, bits), size), rows)


def test_a_tiff_of_32_bits_is_read_up_to_65535(encode):
    values = np.array([[3, 65_535]], np.int32)
    data = encode(Image.fromarray(values), "TIFF")
    np.testing.assert_array_equal(values_of(data, (1, 2)), values)
    refused(encode(Image.fromarray(values + 1), "TIFF"), (1, 2), "from 4 to 65536")
    refused(encode(Image.fromarray(values - 9), "TIFF"), (1, 2), "from -6 to")


@pytest.mark.parametrize(
    ("mode", "kind", "what"),
    [
        ("RGB", "PNG", r"holds colours or fractions \(RGB\)"),
        ("RGBA", "PNG", r"holds colours or fractions \(RGBA\)"),
        ("LA", "PNG", r"holds colours or fractions \(LA\)"),
        ("F", "TIFF", r"holds colours or fractions \(F\)"),
        ("L", "JPEG", "JPEG, which need not keep"),
        ("L", "WEBP", "WEBP, which need not keep"),
    ],
)
def test_what_holds_no_values_is_refused(encode, mode, kind, what):
    refused(encode(Image.new(mode, (3, 2)), kind), (2, 3), what)


def test_inverted_grey_is_refused(encode):
    refused(encode(Image.new("L", (3, 2)), "TIFF", tiffinfo={262: 0}), (2, 3), "grey inverted")


def test_damage_is_told_as_of_an_image(encode):
    data = encode(Image.fromarray(np.random.default_rng(0).integers(0, 9, (40, 40), np.uint8)))
    refused(b"", (40, 40), "file is empty")
    refused(b"no image", (40, 40), "not an image")
    refused(data[: len(data) // 2], (40, 40), "truncated|corrupt")


def test_a_mask_of_another_size_is_refused(encode):
    refused(encode(Image.new("L", (4, 3))), (4, 3), "mask is 4 × 3 pixels, its image 3 × 4")


def turned(kind, values, encode, orientation):
    """An encoded image that stores given values and an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(Image.fromarray(values), kind, exif=exif)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_both_turned_lie_on_each_other(encode, orientation):
    classes = np.random.default_rng(0).integers(0, 200, (5, 8), np.uint8)
    rgb = np.repeat(classes[..., None], 3, axis=2)
    image = decode_oriented(turned("PNG", rgb, encode, orientation), where="it")
    with_own = turned("PNG", classes, encode, orientation)
    without = encode(Image.fromarray(classes))
    for found in (
        decode_mask(with_own, image, where="it"),
        decode_mask(with_own, image, where="it", turn="both"),
        decode_mask(without, image, where="it", turn="both"),
    ):
        np.testing.assert_array_equal(found, np.asarray(image.pixels)[..., 0])


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_mask_drawn_on_the_upright_image_is_not_turned(encode, orientation):
    classes = np.random.default_rng(0).integers(0, 200, (5, 8), np.uint8)
    image = Decoded(Image.new("RGB", (8, 5)), orientation)
    found = decode_mask(encode(Image.fromarray(classes)), image, where="it", turn="image")
    np.testing.assert_array_equal(found, classes)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_which_way_up_is_never_guessed(encode, orientation):
    mask = encode(Image.new("L", (4, 4)))
    refused(mask, (4, 4), "so either may fit", orientation=orientation)


def test_a_mask_with_an_orientation_of_its_own_is_turned_onto_an_upright_image(encode):
    classes = np.arange(6, dtype=np.uint8).reshape(2, 3)
    found = values_of(turned("PNG", classes, encode, 6), (3, 2))
    np.testing.assert_array_equal(found, np.rot90(classes, -1))
