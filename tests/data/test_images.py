"""Image files of every kind are read as what they show, or refused by name."""

import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nslightning.data import Augmentation, DataError, ImageFolder, Preprocessing
from nslightning.data.images import FileImages, pixels_of, read_image

RAMP = np.linspace(0, 65535, 12 * 10).astype(np.uint16).reshape(12, 10)
EIGHT = (RAMP >> 8).astype(np.uint8)
COLOURS = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)


def pixels(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = read_image(str(path))
    assert image.mode == "RGB"
    return np.asarray(image)


def unscaled(size):
    return Preprocessing("unscaled", size, 224 / 256, mean=(0.0,) * 3, std=(1.0,) * 3)


def gray(values):
    return np.repeat(values[:, :, None], 3, axis=2)


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled(ending, tmp_path):
    Image.fromarray(RAMP).save(tmp_path / f"a.{ending}")
    assert np.array_equal(pixels(tmp_path / f"a.{ending}"), gray(EIGHT))


def test_sixteen_bits_of_the_other_byte_order(tmp_path):
    Image.frombytes("I;16B", (10, 12), RAMP.astype(">u2").tobytes()).save(tmp_path / "a.tif")
    assert np.array_equal(pixels(tmp_path / "a.tif"), gray(EIGHT))


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (RAMP.astype(np.float32) / 65535, "floating-point numbers"),
        (RAMP.astype(np.int32) * 1000, "integers of 32 bits"),
    ],
)
def test_numbers_without_a_scale_are_refused_by_name(values, kind, tmp_path):
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="8 or 16 bits") as error:
        read_image(str(tmp_path / "a.tif"))
    assert kind in str(error.value)
    assert str(tmp_path / "a.tif") in str(error.value)


def write_tiff(file, rows, bits, photometric=1, sample_format=1):
    """A TIFF of one channel, 12 x 10: rows as bytes, and what its tags say of them."""
    tags = {
        256: 10, 257: 12, 258: bits, 259: 1, 262: photometric, 273: 8 + 2 + 10 * 12 + 4, 277: 1, 278: 12,
        279: len(rows), 339: sample_format,
    }  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    file.write_bytes(b"II" + struct.pack("<HIH", 42, 8, len(tags)) + entries + bytes(4) + rows)


def twelve_bits(values):
    first, second = values.reshape(-1, 2).astype(np.uint16).T
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()


def test_twelve_bits_are_scaled(tmp_path):
    write_tiff(tmp_path / "a.tif", twelve_bits(RAMP >> 4), bits=12)
    assert np.array_equal(pixels(tmp_path / "a.tif"), gray(EIGHT))


def test_a_tiff_whose_0_is_white_is_no_negative(tmp_path):
    for bits, rows in ((8, 255 - EIGHT), (16, (65535 - RAMP).astype("<u2"))):
        write_tiff(tmp_path / "a.tif", rows.tobytes(), bits, photometric=0)
        assert np.array_equal(pixels(tmp_path / "a.tif"), gray(EIGHT))


@pytest.mark.parametrize(
    ("dtype", "says"),
    [("i1", "signed integers"), ("<i2", "signed integers"), ("<f2", "floating-point"), ("<f8", "floating-point")],
)
def test_numbers_with_a_sign_or_a_point_are_refused_by_name(dtype, says, tmp_path):
    rows = (RAMP // 512).astype(dtype)
    write_tiff(tmp_path / "a.tif", rows.tobytes(), rows.itemsize * 8, sample_format=3 if "f" in dtype else 2)
    with pytest.raises(DataError, match=rf"a\.tif: .*({says}|cannot be decoded)[^\n]*\n.*PNG"):
        read_image(str(tmp_path / "a.tif"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_exif_says_which_side_is_up(orientation, ending, tmp_path):
    bright = np.zeros((8, 16), np.uint8)
    bright[:4, :8] = 255  # the quarter at the top left of the image as it is stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(bright).save(tmp_path / f"a.{ending}", exif=exif)
    shown = pixels(tmp_path / f"a.{ending}")[:, :, 0] > 127
    # The EXIF standard: where the stored row 0 and column 0 are seen.
    top, left, turned = {
        1: (True, True, False), 2: (True, False, False), 3: (False, False, False), 4: (False, True, False),
        5: (True, True, True), 6: (True, False, True), 7: (False, False, True), 8: (False, True, True),
    }[orientation]  # fmt: skip
    height, width = (16, 8) if turned else (8, 16)
    expected = np.zeros((height, width), bool)
    rows, columns = np.arange(height) < height // 2, np.arange(width) < width // 2
    expected[np.ix_(rows == top, columns == left)] = True
    assert np.array_equal(shown, expected)


def test_transparency_is_dropped(tmp_path):
    alpha = np.full((12, 10), 7, np.uint8)
    Image.merge("LA", [Image.fromarray(EIGHT), Image.fromarray(alpha)]).save(tmp_path / "gray.png")
    assert np.array_equal(pixels(tmp_path / "gray.png"), gray(EIGHT))
    Image.fromarray(np.dstack([COLOURS, alpha])).save(tmp_path / "colour.png")
    assert np.array_equal(pixels(tmp_path / "colour.png"), COLOURS)


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(256))])
def test_palettes_are_looked_up(transparency, tmp_path):
    image = Image.fromarray(EIGHT).copy()
    image = Image.fromarray(EIGHT, "L").convert("P") if transparency is None else image.convert("P")
    table = np.random.default_rng(1).integers(0, 256, (256, 3), dtype=np.uint8)
    image.putpalette(table.tobytes())
    options = {} if transparency is None else {"transparency": transparency}
    image.save(tmp_path / "a.png", **options)
    assert np.array_equal(pixels(tmp_path / "a.png"), table[np.asarray(image)])


def test_bilevel_and_cmyk(tmp_path):
    Image.fromarray(EIGHT > 99).save(tmp_path / "bits.png")
    assert np.array_equal(pixels(tmp_path / "bits.png"), gray(np.where(EIGHT > 99, 255, 0).astype(np.uint8)))
    cmyk = Image.fromarray(np.dstack([COLOURS, EIGHT // 2]), "CMYK")
    cmyk.save(tmp_path / "ink.tif")
    ink, black = 255 - COLOURS.astype(float), 255 - (EIGHT // 2).astype(float)[:, :, None]
    assert np.abs(pixels(tmp_path / "ink.tif") - ink * black / 255).max() <= 1
    cmyk.save(tmp_path / "ink.jpg", quality=100, subsampling=0)
    assert np.abs(pixels(tmp_path / "ink.jpg").astype(float) - ink * black / 255).max() < 20


@pytest.mark.parametrize("ending", ["gif", "png", "webp", "tif"])
def test_an_animation_is_its_first_frame(ending, tmp_path):
    frames = [Image.fromarray(np.full((12, 10), v, np.uint8)) for v in (200, 10, 90)]
    lossless = {"lossless": True} if ending == "webp" else {}
    frames[0].save(tmp_path / f"a.{ending}", save_all=True, append_images=frames[1:], **lossless)
    assert (pixels(tmp_path / f"a.{ending}") == 200).all()


@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1)])
def test_an_image_of_one_pixel_fills_the_batch(shape, augment, tmp_path):
    Image.fromarray(np.full(shape, 51, np.uint8)).save(tmp_path / "a.png")
    images = FileImages([(str(tmp_path / "a.png"), 0)], unscaled(16), Augmentation() if augment else None)
    batch, _ = images.__getitems__([0])
    assert torch.equal(batch, torch.full((1, 3, 16, 16), 0.2))


def test_sixteen_bits_make_no_ties(tmp_path):
    """Read without scaling, every pixel above 255 was white: one value, and a tie in every window."""
    Image.fromarray(RAMP[6:]).save(tmp_path / "a.png")
    batch, _ = FileImages([(str(tmp_path / "a.png"), 0)], unscaled(8)).__getitems__([0])
    assert len(batch[0, 0].unique()) > 20


def test_what_is_no_image_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    with pytest.raises(DataError, match=r"a\.png: the image cannot be decoded"):
        read_image(str(tmp_path / "a.png"))


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no /proc/self/mem, whose reading is an I/O error")
def test_a_disk_that_does_not_answer_is_no_damaged_image(tmp_path):
    (tmp_path / "image.png").symlink_to("/proc/self/mem")
    with pytest.raises(DataError, match=r"image.png: it cannot be read \(Input/output error\).\nThe file may be whole"):
        read_image(str(tmp_path / "image.png"))
    (tmp_path / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(DataError, match=r"damaged.png: the image cannot be decoded"):
        read_image(str(tmp_path / "damaged.png"))


def test_the_sizes_of_files_are_named(tmp_path):
    files = [str(tmp_path / f"{i}.png") for i in range(3)]
    for file, (width, height) in zip(files, [(30, 20), (64, 48), (8, 8)], strict=True):
        Image.fromarray(np.zeros((height, width), np.uint8)).save(file)
    assert pixels_of(files) == "8 x 8 to 64 x 48 pixels"
    assert pixels_of(files[:1]) == "30 x 20 pixels"
    Path(files[0]).write_bytes(b"no image")
    assert pixels_of([files[0], str(tmp_path / "gone.png")]) == ""
    assert pixels_of(files[:2]) == "64 x 48 pixels"


def test_a_training_says_that_files_are_resized(tmp_path):
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            Image.fromarray(np.zeros((20, 30), np.uint8)).save(tmp_path / split / label / "a.png")
    images = ImageFolder(str(tmp_path), image_size=16, workers=0)
    images.setup("fit")
    assert images.summary == "images of 3x16x16, 2 classes; resized and cropped, the first file from 30 x 20 pixels"


def test_files_that_are_not_read_are_named(tmp_path):
    """An animation, a photo of a telephone: Lightning would train without them, and nothing would say so."""
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            Image.fromarray(EIGHT).save(tmp_path / split / label / "a.png")
    (tmp_path / "train/cat/.DS_Store").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ImageFolder(str(tmp_path)).setup("fit")
    for name in ("cat/b.gif", "dog/c.GIF", "dog/photo.heic"):
        (tmp_path / "train" / name).touch()
    with pytest.warns(UserWarning, match=r"3 files of .*train are left out.*\.gif \(2\), \.heic \(1\).*\.png") as said:
        ImageFolder(str(tmp_path)).setup("fit")
    assert len(said) == 1
    (tmp_path / "val/dog/a.png").rename(tmp_path / "val/dog/a.gif")
    with (
        pytest.warns(UserWarning, match="train are left out"),
        pytest.raises(DataError, match=r"val: count: .*no.*dog.*\n.*\.png"),
    ):
        ImageFolder(str(tmp_path)).setup("fit")
