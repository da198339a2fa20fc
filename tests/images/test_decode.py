import io
import os
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from visae.errors import ImageError
from visae.images.decode import decode, read_image
from visae.storage.hashing import hash_bytes

# Exif 2.32, tag 0x0112: the side of the scene that row 0 and column 0 of the file show.
SIDES = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def random_rgb(height=7, width=5, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def upright_by_the_standard(stored, orientation):
    """Put every stored pixel where the EXIF standard says that it belongs."""
    height, width = stored.shape[:2]
    if orientation >= 5:
        height, width = width, height
    scene = np.zeros((height, width, 3), np.uint8)
    for row, column in np.ndindex(*stored.shape[:2]):
        place = {}
        for side, offset in zip(SIDES[orientation], (row, column), strict=True):
            axis, last = ("y", height - 1) if side in ("top", "bottom") else ("x", width - 1)
            place[axis] = offset if side in ("top", "left") else last - offset
        scene[place["y"], place["x"]] = stored[row, column]
    return scene


def exif_of(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def decoded(data, **options):
    image = decode(data, where="it", **options)
    assert image.mode == "RGB"
    return np.asarray(image)


def reason(data, **options):
    with pytest.raises(ImageError) as caught:
        decode(data, where="holiday.jpg", **options)
    assert "holiday.jpg" in str(caught.value)
    assert caught.value.fix
    return caught.value.what


@pytest.mark.parametrize("orientation", SIDES)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {"lossless": True}),
    ],
    ids=["png", "tiff", "tiff-lzw", "webp"],
)
def test_every_exif_orientation_is_undone_to_the_pixel(encode, orientation, kind, options):
    stored = random_rgb()
    data = encode(Image.fromarray(stored), kind, exif=exif_of(orientation), **options)
    np.testing.assert_array_equal(decoded(data), upright_by_the_standard(stored, orientation))


@pytest.mark.parametrize("orientation", SIDES)
def test_every_exif_orientation_of_a_jpeg_is_undone(encode, orientation):
    image = Image.fromarray(random_rgb())
    stored = decoded(encode(image, "JPEG"))
    data = encode(image, "JPEG", exif=exif_of(orientation))
    np.testing.assert_array_equal(decoded(data), upright_by_the_standard(stored, orientation))


def test_an_upright_image_carries_no_orientation_to_apply_twice(encode):
    data = encode(Image.fromarray(random_rgb()), "JPEG", exif=exif_of(6))
    image = decode(data, where="it")
    assert image.info == {}
    assert dict(image.getexif()) == {}


def test_a_damaged_exif_block_leaves_the_image_as_stored(encode):
    stored = random_rgb()
    data = encode(Image.fromarray(stored), "PNG", exif=b"Exif\0\0not a TIFF header at all")
    np.testing.assert_array_equal(decoded(data), stored)


def test_plain_rgb_is_kept(encode):
    stored = random_rgb()
    np.testing.assert_array_equal(decoded(encode(Image.fromarray(stored))), stored)


def test_grey_fills_three_channels(encode):
    grey = random_rgb()[..., 0]
    expected = np.repeat(grey[..., None], 3, axis=2)
    np.testing.assert_array_equal(decoded(encode(Image.fromarray(grey))), expected)


def test_one_bit_is_black_and_white(encode):
    bits = random_rgb()[..., 0] > 127
    data = encode(Image.fromarray(bits))
    expected = np.repeat(np.where(bits, 255, 0)[..., None], 3, axis=2)
    np.testing.assert_array_equal(decoded(data), expected)


def every_16_bit_value():
    return np.arange(65536, dtype=np.uint16).reshape(256, 256)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_divided_by_257_and_rounded(encode, kind):
    values = every_16_bit_value()
    expected = np.rint(values.astype(np.float64) * 255 / 65535)
    got = decoded(encode(Image.fromarray(values), kind))
    for channel in range(3):
        np.testing.assert_array_equal(got[..., channel], expected)


def test_big_endian_16_bit_grey_is_scaled_too(encode):
    values = every_16_bit_value()
    data = encode(Image.frombytes("I;16B", (256, 256), values.astype(">u2").tobytes()), "TIFF")
    expected = np.rint(values.astype(np.float64) / 257)
    np.testing.assert_array_equal(decoded(data)[..., 0], expected)


def test_32_bit_grey_within_16_bits_is_scaled(encode):
    values = np.array([[0, 257, 32896, 65535]], dtype=np.int32)
    assert decoded(encode(Image.fromarray(values), "TIFF"))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("value", [-1, 65536])
def test_32_bit_grey_beyond_16_bits_is_refused_not_clipped(encode, value):
    data = encode(Image.fromarray(np.full((2, 2), value, np.int32)), "TIFF")
    assert reason(data) == "Grey values lie outside 0 to 65535"


def raw_tiff(pixels, width, bits, extra_samples=None):
    """A one-row TIFF of kinds that Pillow cannot write; ``bits`` of each sample of a pixel."""
    packed_bits = sum(b << (16 * i) for i, b in enumerate(bits))
    tags = [(256, 4, 1, width), (257, 4, 1, 1), (258, 3, len(bits), packed_bits), (259, 3, 1, 1)]
    tags += [(262, 3, 1, 1), (273, 4, 1, 8), (277, 3, 1, len(bits)), (278, 4, 1, 1)]
    tags += [(279, 4, 1, len(pixels))]
    if extra_samples is not None:
        tags.append((338, 3, 1, extra_samples))
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    body = pixels + b"\0" * (len(pixels) % 2)
    return struct.pack("<2sHI", b"II", 42, 8 + len(body)) + body + directory


def test_12_bit_grey_is_scaled_by_its_own_range():
    data = raw_tiff(bytes.fromhex("fff3e8"), width=2, bits=[12])  # 4095 and 1000
    assert decoded(data)[0, :, 0].tolist() == [255, round(1000 * 255 / 4095)]


def test_16_bit_grey_where_zero_is_white_is_inverted(encode):
    values = every_16_bit_value()
    data = encode(Image.fromarray(values), "TIFF", tiffinfo={262: 0})
    expected = 255 - np.rint(values.astype(np.float64) / 257)
    np.testing.assert_array_equal(decoded(data)[..., 0], expected)


def test_floats_from_zero_to_one_are_scaled(encode):
    values = np.array([[0.0, 0.25, 0.5, 1.0]], dtype=np.float32)
    assert decoded(encode(Image.fromarray(values), "TIFF"))[0, :, 0].tolist() == [0, 64, 128, 255]


@pytest.mark.parametrize("value", [-0.01, 1.01, np.nan, np.inf])
def test_floats_outside_zero_to_one_are_refused(encode, value):
    data = encode(Image.fromarray(np.array([[0.5, value]], np.float32)), "TIFF")
    assert reason(data) == "Float values lie outside 0 to 1"


def on_white(colour, alpha):
    share = alpha[..., None].astype(np.float64) / 255
    return colour * share + 255 * (1 - share)


def test_rgba_is_laid_on_white(encode):
    colour, alpha = random_rgb(16, 16), random_rgb(16, 16, seed=1)[..., 0]
    alpha[0], alpha[1] = 0, 255
    got = decoded(encode(Image.fromarray(np.dstack([colour, alpha]))))
    assert (got[0] == 255).all()
    np.testing.assert_array_equal(got[1], colour[1])
    np.testing.assert_allclose(got, on_white(colour, alpha), atol=1)


def test_grey_with_alpha_is_laid_on_white(encode):
    grey, alpha = random_rgb()[..., 0], random_rgb(seed=1)[..., 0]
    got = decoded(encode(Image.fromarray(np.dstack([grey, alpha]))))
    expected = on_white(np.repeat(grey[..., None], 3, axis=2), alpha)
    np.testing.assert_allclose(got, expected, atol=1)


def palette_image():
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    return image


def test_a_palette_becomes_its_colours(encode):
    expected = [[10, 20, 30], [40, 50, 60], [70, 80, 90]]
    assert decoded(encode(palette_image()))[0].tolist() == expected


@pytest.mark.parametrize("transparency", [1, bytes([255, 0, 255])], ids=["index", "alphas"])
def test_a_transparent_palette_entry_becomes_white(encode, transparency):
    data = encode(palette_image(), transparency=transparency)
    assert decoded(data)[0].tolist() == [[10, 20, 30], [255, 255, 255], [70, 80, 90]]


def test_a_transparent_grey_value_becomes_white(encode):
    grey = Image.fromarray(np.array([[5, 6]], np.uint8))
    assert decoded(encode(grey, transparency=5))[0, :, 0].tolist() == [255, 6]


def test_a_transparent_16_bit_grey_value_becomes_white(encode):
    grey = Image.fromarray(np.array([[0, 25700]], np.uint16))
    assert decoded(encode(grey, transparency=0))[0, :, 0].tolist() == [255, 100]


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_becomes_rgb(encode, kind):
    inks = np.zeros((8, 8, 4), np.uint8)
    inks[..., 0] = 255  # cyan alone absorbs red
    got = decoded(encode(Image.frombytes("CMYK", (8, 8), inks.tobytes()), kind))
    np.testing.assert_allclose(got, np.full((8, 8, 3), [0, 255, 255]), atol=2)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations_give_their_first_frame(encode, kind):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert (decoded(data) == [255, 0, 0]).all()


def test_premultiplied_grey_with_alpha_is_laid_on_white():
    # 60 is premultiplied by 128/255: over white it is 60 + 255 · (1 − 128/255).
    data = raw_tiff(bytes([60, 128]), width=1, bits=[8, 8], extra_samples=1)
    np.testing.assert_allclose(decoded(data), np.full((1, 1, 3), 187), atol=2)


def test_lab_becomes_rgb(encode):
    data = encode(Image.new("LAB", (1, 1), (255, 128, 128)), "TIFF")
    np.testing.assert_allclose(decoded(data), np.full((1, 1, 3), 255), atol=2)


def test_zero_bytes_have_their_reason():
    assert reason(b"") == "The file is empty"


@pytest.mark.parametrize("data", [b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_what_is_not_an_image_has_its_reason(data):
    assert reason(data) == "This is not an image, or its header is damaged"


FORMATS = ["PNG", "JPEG", "TIFF", "BMP", "GIF", "PPM", "WEBP"]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("lenient", [False, True], ids=["strict", "lenient"])
def test_truncated_images_are_refused_whatever_pillow_is_set_to(encode, monkeypatch, kind, lenient):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    data = encode(Image.fromarray(random_rgb(64, 64)), kind)
    cut = reason(data[: len(data) * 2 // 3])
    assert cut == ("The image is corrupt" if kind == "WEBP" else "The image is truncated")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is lenient


def png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_claiming(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = png_chunk(b"IDAT", zlib.compress(b"\0\0\0\0"))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + body + png_chunk(b"IEND", b"")


def test_corrupt_pixels_have_their_reason(encode):
    data = encode(Image.fromarray(random_rgb(64, 64)))
    middle = data.index(b"IDAT") + 400
    assert reason(data[:middle] + b"\0" * 50 + data[middle + 50 :]) == "The image is corrupt"


@pytest.mark.parametrize("side", [10_000, 13_000, 50_000])
def test_a_decompression_bomb_is_refused_by_its_header_without_a_warning(side):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reason(png_claiming(side, side + 1)) == "The image is too large"


def test_the_limit_counts_pixels(encode):
    data = encode(Image.new("RGB", (20, 10)))
    assert decoded(data, max_pixels=200).shape == (10, 20, 3)
    assert reason(data, max_pixels=199) == "The image is too large"


def test_an_image_above_pillows_warning_limit_decodes_without_a_warning(encode, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decoded(encode(Image.new("RGB", (20, 10)))).shape == (10, 20, 3)


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_an_image_without_pixels_is_refused(size):
    assert reason(png_claiming(*size)) == "This is not an image, or its header is damaged"


def test_threads_share_the_strict_settings_and_restore_them(encode, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    filters = list(warnings.filters)
    whole = encode(Image.fromarray(random_rgb(64, 64)), "JPEG")

    def is_refused(i):
        try:
            decode(whole[: len(whole) // 2] if i % 2 else whole, where=str(i))
        except ImageError:
            return True
        return False

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(is_refused, range(64))) == [bool(i % 2) for i in range(64)]
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True
    assert warnings.filters == filters


def encoded_samples():
    image = Image.fromarray(random_rgb(9, 11))
    samples = []
    for kind in FORMATS:
        file = io.BytesIO()
        image.save(file, kind)
        samples.append(file.getvalue())
    return samples


@settings(max_examples=150, deadline=None)
@given(
    data=st.sampled_from(encoded_samples()),
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=5),
)
def test_altered_bytes_give_pixels_or_an_image_error(data, changes):
    altered = bytearray(data)
    for share, value in changes:
        altered[min(int(share**3 * len(data)), len(data) - 1)] = value
    try:
        image = decode(bytes(altered), where="it", max_pixels=10**6)
    except ImageError:
        return
    assert image.mode == "RGB"
    assert image.width * image.height <= 10**6


def test_read_image_hashes_the_bytes_of_the_file(tmp_path, encode):
    stored = random_rgb()
    data = encode(Image.fromarray(stored))
    (tmp_path / "a.png").write_bytes(data)
    image = read_image(tmp_path / "a.png", where="a.png")
    assert image.content_id == hash_bytes(data)
    np.testing.assert_array_equal(np.asarray(image.pixels), stored)


def test_read_image_says_why_a_file_cannot_be_read(tmp_path, monkeypatch):
    def what(name):
        with pytest.raises(ImageError) as caught:
            read_image(tmp_path / name, where=name)
        return caught.value.what

    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "big.png").touch()
    os.truncate(tmp_path / "big.png", 2**30 + 1)
    assert what("gone.png") == "The file is missing"
    assert what("nul\0.png") == "The file cannot be opened"
    assert what("pipe.png") == "This is not a regular file"
    assert what("big.png") == "The file is larger than 1 GiB"

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "secret.png").touch()
    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    assert what("secret.png") == "The file cannot be opened"
