"""Every kind of picture file: converted with a word about it, or refused with one error."""

import io
import struct
import zlib

import pytest
from PIL import Image
from unipic2.cli.pictures import read_masked, read_rgb
from unipic2.core.errors import InputError
from unipic2.core.files import write_file

RGB, GREY_ALPHA, RGBA = 2, 4, 6


def raw_png(width, height, bits, colour_type, rows) -> bytes:
    """Build a PNG by hand: Pillow writes no 16-bit colour."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def read(path):
    data, notes = read_rgb(path)
    image = Image.open(io.BytesIO(data))
    image.load()
    assert (image.format, image.mode) == ("PNG", "RGB")
    return image, notes


def save(path, image, **options):
    image.save(path, **options)
    return path


def test_plain_rgb_is_unchanged_and_unremarked(tmp_path):
    image, notes = read(save(tmp_path / "a.png", Image.new("RGB", (3, 2), (1, 2, 3))))
    assert image.size == (3, 2) and image.getpixel((0, 0)) == (1, 2, 3) and notes == []


def test_alpha_goes_over_white(tmp_path):
    picture = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    picture.putpixel((1, 0), (200, 0, 0, 128))
    image, notes = read(save(tmp_path / "a.png", picture))
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert image.getpixel((1, 0)) == pytest.approx((227, 127, 127), abs=1)
    assert notes == ["transparency put over white"]


@pytest.mark.parametrize("mode", ["LA", "P"])
def test_other_transparency(tmp_path, mode):
    picture = Image.new("RGBA", (2, 2), (0, 0, 0, 0)).convert(mode)
    options = {"transparency": picture.getpixel((0, 0))} if mode == "P" else {}
    image, notes = read(save(tmp_path / "a.png", picture, **options))
    assert image.getpixel((0, 0)) == (255, 255, 255) and notes == ["transparency put over white"]


def test_opaque_alpha_is_not_worth_a_word(tmp_path):
    _, notes = read(save(tmp_path / "a.png", Image.new("RGBA", (2, 2), (9, 9, 9, 255))))
    assert notes == []


@pytest.mark.parametrize("value", [0, 255, 257, 32768, 40000, 65535])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, value):
    image, notes = read(save(tmp_path / "a.png", Image.new("I;16", (2, 2), value)))
    assert image.getpixel((0, 0)) == (round(value / 257),) * 3
    assert notes == ["16 bits scaled to 8"]


@pytest.mark.parametrize(("kind", "channels"), [(RGB, 3), (RGBA, 4), (GREY_ALPHA, 2)])
def test_16_bit_colour(tmp_path, kind, channels):
    opaque = [40000] * channels
    if kind != RGB:
        opaque[-1] = 65535
    (tmp_path / "a.png").write_bytes(raw_png(1, 1, 16, kind, b"\0" + struct.pack(f">{channels}H", *opaque)))
    image, notes = read(tmp_path / "a.png")
    assert image.getpixel((0, 0)) == pytest.approx((156, 156, 156), abs=1)
    assert notes == ["16 bits scaled to 8"]


def test_cmyk(tmp_path):
    image, notes = read(save(tmp_path / "a.jpg", Image.new("CMYK", (16, 16), (0, 255, 255, 0)), quality=100))
    assert image.getpixel((8, 8)) == pytest.approx((255, 0, 0), abs=4) and notes == ["CMYK to RGB"]


def test_exif_rotation_is_applied(tmp_path):
    picture = Image.new("RGB", (4, 2), "black")
    picture.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by 90 degrees clockwise
    image, notes = read(save(tmp_path / "a.png", picture, exif=exif))
    assert image.size == (2, 4) and image.getpixel((1, 0)) == (255, 0, 0)
    assert notes == ["EXIF rotation applied"] and not image.getexif()


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    image, notes = read(save(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:]))
    assert image.getpixel((0, 0)) == (255, 0, 0) and notes == ["first of 2 frames"]


@pytest.mark.parametrize("mode", ["L", "1", "P", "YCbCr"])
def test_other_modes_become_rgb(tmp_path, mode):
    suffix = "jpg" if mode == "YCbCr" else "png"
    image, notes = read(save(tmp_path / f"a.{suffix}", Image.new("RGB", (8, 8), "white").convert(mode)))
    assert image.getpixel((0, 0)) == (255, 255, 255) and notes == []


def bad_pictures():
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 80).save(whole, "PNG")
    jpeg = io.BytesIO()
    Image.effect_noise((64, 64), 80).save(jpeg, "JPEG")
    floats = io.BytesIO()
    Image.new("F", (2, 2), 0.5).save(floats, "TIFF")
    wide = io.BytesIO()
    Image.new("I", (2, 2), 70000).save(wide, "TIFF")
    return {
        "empty file": (b"", "an empty file"),
        "text": (b"hello, I am no picture", "not a picture"),
        "zero width": (raw_png(0, 4, 8, RGB, b""), "not a picture"),
        "truncated PNG": (whole.getvalue()[: len(whole.getvalue()) // 2], "truncated"),
        "truncated JPEG": (jpeg.getvalue()[: len(jpeg.getvalue()) // 2], "truncated"),
        "header only": (whole.getvalue()[:20], "picture"),
        "damaged chunk": (whole.getvalue().replace(b"IDAT", b"IDAX", 1), "picture"),
        "32-bit float": (floats.getvalue(), "32-bit floats"),
        "32-bit integers": (wide.getvalue(), "70000"),
        "bomb": (raw_png(60000, 60000, 8, RGB, b"\0"), "too many pixels"),
    }


@pytest.mark.parametrize("kind", list(bad_pictures()))
def test_bad_pictures_are_one_error(tmp_path, kind):
    data, words = bad_pictures()[kind]
    (tmp_path / "bad.png").write_bytes(data)
    with pytest.raises(InputError) as error:
        read_rgb(tmp_path / "bad.png")
    assert f"picture {tmp_path / 'bad.png'}" in str(error.value) and words in str(error.value)


def test_folder_and_missing_file(tmp_path):
    for path in (tmp_path, tmp_path / "missing.png"):
        with pytest.raises(InputError, match="picture"):
            read_rgb(path)


def test_a_write_that_the_system_refuses_leaves_nothing(tmp_path):
    resource = pytest.importorskip("resource", reason="POSIX limits")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(InputError, match="File too large"):
            write_file(tmp_path / "out.png", b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
    write_file(tmp_path / "out.png", b"x" * 5000)
    assert (tmp_path / "out.png").stat().st_size == 5000


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_a_mask_wants_a_transparent_pixel(tmp_path, mode):
    """A channel for it is not enough: screenshots have one, all opaque."""
    picture = Image.new("RGBA", (4, 4), (10, 20, 30, 255))
    with pytest.raises(InputError, match=rf"a.png: found none \(mode {mode}\), expected transparency"):
        read_masked(save(tmp_path / "a.png", picture.convert(mode)))
    picture.putpixel((1, 2), (10, 20, 30, 0))
    found = Image.open(io.BytesIO(read_masked(save(tmp_path / "b.png", picture))))
    assert found.mode == "RGBA" and found.getpixel((1, 2)) == (10, 20, 30, 0) and found.getpixel((0, 0))[3] == 255
