"""The pixels of still images of every format, against Pillow's and against those written."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from dmd_jax.data.image_files import decode_image
from dmd_jax.data.images import open_images
from dmd_jax.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
RED, BLUE = (255, 0, 0), (0, 0, 255)
# EXIF's orientations: how NumPy turns what is stored into what is seen (Exif 2.32, 4.6.4).
UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: np.rot90(x),
}


def written(image, form, **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def bit_depth_16_png():
    """A colour PNG of 16 bits, which Pillow does not write and reads by its high bytes."""

    def chunk(kind, body):
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes(12)) * 2)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def colour_tiff_of_16_bits():
    """An uncompressed RGB TIFF of one pixel with 16 bits a sample, little-endian."""
    values = {256: (3, 1, 1), 257: (3, 1, 1), 258: (3, 3, 122), 259: (3, 1, 1), 262: (3, 1, 2)}
    values |= {273: (4, 1, 128), 277: (3, 1, 3), 278: (3, 1, 1), 279: (4, 1, 6)}
    entries = b"".join(struct.pack("<HHII", tag, *value) for tag, value in values.items())
    data = b"II*\0" + struct.pack("<IH", 8, len(values)) + entries + struct.pack("<I", 0)
    return data.ljust(122, b"\0") + struct.pack("<3H", 16, 16, 16) + bytes(6)


@pytest.mark.parametrize("form, options", [
    ("PNG", {}),
    ("BMP", {}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("TIFF", {"compression": "tiff_deflate"}),
    ("WEBP", {"lossless": True}),
])  # fmt: skip
def test_lossless_formats_give_what_was_written(form, options):
    data = written(Image.fromarray(PIXELS), form, **options)
    np.testing.assert_array_equal(decode_image(data, "a"), PIXELS)


@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
def test_lossy_formats_give_what_pillow_gives(form):
    smooth = np.linspace(0, 255, 16 * 16 * 3).reshape(16, 16, 3).astype(np.uint8)
    data = written(Image.fromarray(smooth), form, quality=95)
    pixels = decode_image(data, "a")
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(data))))
    assert np.abs(pixels.astype(int) - smooth).max() < 16  # and not something else's


@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "TIFF"])
def test_grey_stays_grey(form):
    data = written(Image.new("L", (3, 2), 77), form)
    np.testing.assert_array_equal(decode_image(data, "a"), np.full((2, 3, 1), 77))


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_turns_the_image_upright(form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if form == "WEBP" else {}
    data = written(Image.fromarray(PIXELS), form, exif=exif, **options)
    np.testing.assert_array_equal(decode_image(data, "a"), UPRIGHT[orientation](PIXELS))


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_turns_a_jpeg_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(PIXELS.repeat(8, 0).repeat(8, 1))
    plain = np.asarray(Image.open(io.BytesIO(written(image, "JPEG"))))
    found = decode_image(written(image, "JPEG", exif=exif), "a")
    np.testing.assert_array_equal(found, UPRIGHT[orientation](plain))


def test_palettes_and_opaque_transparency_keep_their_colours():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    expected = [[[10, 20, 30], [40, 50, 60]]]
    for form in ("PNG", "BMP", "TIFF"):
        np.testing.assert_array_equal(decode_image(written(palette, form), "a"), expected)
    opaque = written(palette, "PNG", transparency=b"\xff\xff")
    with warnings.catch_warnings(action="error"):
        np.testing.assert_array_equal(decode_image(opaque, "a"), expected)


def animation(form):
    first, second = Image.new("RGB", (4, 4), RED), Image.new("RGB", (4, 4), BLUE)
    return written(first, form, save_all=True, append_images=[second])


@pytest.mark.parametrize("data, message", [
    (animation("PNG"), "a PNG of several pictures"),
    (animation("WEBP"), "a WEBP of several pictures"),
    (animation("TIFF"), "a TIFF of several pictures"),
    (bit_depth_16_png(), "a PNG of 16 bits a sample"),
    (colour_tiff_of_16_bits(), "16 bits a sample"),
    (written(Image.new("I;16", (2, 2)), "TIFF"), "16 bits a sample"),
    (written(Image.new("F", (2, 2)), "TIFF"), "32 bits a sample"),
    (written(Image.new("CMYK", (2, 2)), "JPEG"), "a JPEG of mode CMYK"),
    (written(Image.new("CMYK", (2, 2)), "TIFF"), "a TIFF of mode CMYK"),
    (written(Image.new("LAB", (2, 2)), "TIFF"), "a TIFF of mode LAB"),
    (written(Image.new("RGBA", (2, 2), (1, 2, 3, 4)), "WEBP"), "a WEBP of mode RGBA"),
    (written(Image.new("RGBA", (2, 2), (1, 2, 3, 4)), "TIFF"), "a TIFF of mode RGBA"),
    (written(Image.new("LA", (2, 2)), "PNG"), "a PNG of mode LA"),
    (written(Image.new("RGB", (2, 2)), "PNG", transparency=(0, 0, 0)), "transparent colours"),
    (written(Image.new("P", (2, 2)), "PNG", transparency=b"\0"), "transparent colours"),
    (animation("GIF"), "cannot be read as PNG, JPEG, WEBP, BMP, TIFF"),
    (b"", "is empty"),
    (b"<!DOCTYPE html>", "is an HTML page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "is a Git LFS pointer"),
])  # fmt: skip
def test_what_would_be_read_wrongly_or_in_part_is_refused_by_name(data, message):
    with pytest.raises(UserError, match=f"a.png: .*{message}"):
        decode_image(data, "a.png")


def test_the_first_picture_of_an_mpo_is_read():
    data = animation("MPO")
    np.testing.assert_array_equal(
        decode_image(data, "a"), np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    )


def test_a_folder_of_mixed_formats_is_read_whole(tmp_path):
    names = {"a.JPG": "JPEG", "b.jpeg": "JPEG", "c.png": "PNG", "d.webp": "WEBP", "e.TIFF": "TIFF"}
    names |= {"f.tif": "TIFF", "g.bmp": "BMP", "h.png": "JPEG"}  # the last by content alone
    for index, (name, form) in enumerate(names.items()):
        image = Image.new("RGB", (8, 8), (30 * index,) * 3)
        image.save(tmp_path / name, form, **({"lossless": True} if form == "WEBP" else {}))
    source = open_images(str(tmp_path))
    assert (len(source), source.sample_shape) == (8, (8, 8, 3))
    means = [float(source[index]["x0"].mean()) for index in range(8)]
    np.testing.assert_allclose(means, np.arange(8) * 30 / 127.5 - 1, atol=1.01 / 127.5)


def test_class_names_go_with_the_labels(tmp_path):
    for name in ("dog", "ant", "cat"):
        (tmp_path / "words" / name).mkdir(parents=True)
        Image.new("L", (4, 4)).save(tmp_path / "words" / name / "0.png")
    for name in ("0", "3", "10"):
        (tmp_path / "numbers" / name).mkdir(parents=True)
        Image.new("L", (4, 4)).save(tmp_path / "numbers" / name / "0.png")
    assert open_images(str(tmp_path / "words")).class_names == ("ant", "cat", "dog")
    assert open_images(f"pad2:{tmp_path / 'words'}").class_names == ("ant", "cat", "dog")
    numbers = open_images(str(tmp_path / "numbers")).class_names
    assert numbers == ("0", None, None, "3", *[None] * 6, "10")
    assert open_images("digits").class_names is None
