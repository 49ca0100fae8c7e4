"""Pictures: every mode and format to RGB, refusals by their text, pixels equal to transformers' and LLaVA's."""

from __future__ import annotations

import hashlib
import io
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as pillow
from PIL import ImageFile, ImageOps
from transformers import BitImageProcessorPil, CLIPImageProcessorPil, SiglipImageProcessorPil

from tinychat.core import Image
from tinychat.errors import MediaError, ModelError, UsageError
from tinychat.inputs import images


def encode(picture: pillow.Image, kind: str = "PNG", **options) -> Image:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return Image(data=buffer.getvalue())


def noise(height: int, width: int) -> pillow.Image:
    return pillow.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_every_format_is_known_by_its_content(kind, tmp_path):
    path = tmp_path / "photo.txt"
    pillow.new("RGB", (7, 5), (200, 30, 30)).save(path, kind)
    picture = images.read_image(Image(path=str(path)))
    assert (picture.mode, picture.size) == ("RGB", (7, 5))
    assert np.abs(np.asarray(picture, int) - [200, 30, 30]).max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_as_pillow_does_it(orientation):
    exif = pillow.Exif()
    exif[0x0112] = orientation
    image = encode(noise(6, 4), "PNG", exif=exif)
    expected = ImageOps.exif_transpose(pillow.open(io.BytesIO(image.data)))
    assert np.array_equal(images.read_image(image), expected)
    assert images.image_size(image) == (expected.height, expected.width)


def test_damaged_exif_is_no_reason_to_refuse():
    image = encode(noise(6, 4), "JPEG", exif=b"Exif\0\0nonsense")
    assert images.image_size(image) == (6, 4)
    assert images.read_image(image).size == (4, 6)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_become_white(mode):
    picture = pillow.new("RGBA", (2, 1), (0, 0, 0, 0))
    picture.putpixel((1, 0), (90, 90, 90, 255))
    if mode == "P":
        picture = picture.quantize(4)
    read = images.read_image(encode(picture.convert(mode) if mode == "LA" else picture))
    assert [read.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (90, 90, 90)]


def test_half_transparent_is_blended_with_white():
    read = images.read_image(encode(pillow.new("RGBA", (1, 1), (0, 0, 0, 128))))
    assert read.getpixel((0, 0)) == (127, 127, 127)


def test_transparent_colour_of_a_palette_and_of_grey():
    palette = pillow.new("P", (2, 1), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    read = images.read_image(encode(palette, transparency=0))
    assert [read.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (40, 50, 60)]
    grey = pillow.new("L", (1, 1), 7)
    assert images.read_image(encode(grey, transparency=7)).getpixel((0, 0)) == (255, 255, 255)


def test_one_bit_and_cmyk():
    assert images.read_image(encode(pillow.new("1", (1, 1), 1))).getpixel((0, 0)) == (255, 255, 255)
    cyan = images.read_image(encode(pillow.new("CMYK", (8, 8), (255, 0, 0, 0)), "TIFF"))
    assert cyan.getpixel((0, 0)) == (0, 255, 255)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind):
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    read = images.read_image(encode(pillow.fromarray(values), kind))
    assert np.asarray(read)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_floats_are_scaled_by_their_range():
    read = images.read_image(encode(pillow.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)), "TIFF"))
    assert np.asarray(read)[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation(kind):
    frames = [pillow.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    image = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert images.read_image(image).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_files_are_refused(kind):
    data = encode(noise(64, 64), kind).data
    with pytest.raises(MediaError, match="damaged .*save the picture again"):
        images.read_image(Image(data=data[: len(data) // 2]))
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_a_picture_of_100_megapixels_is_refused_from_its_header(monkeypatch):
    header = encode(pillow.new("1", (10_000, 10_000))).data[:64]
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(MediaError) as caught:
            images.read_image(Image(data=header))
    text = "the image has 10000 x 10000 = 100.0 megapixels, the limit is 40; scale the picture down"
    assert str(caught.value) == text


def test_a_gif_whose_frame_is_larger_than_its_screen_prints_no_warning():
    data = bytearray(encode(pillow.new("L", (8, 8)), "GIF").data)
    frame = data.index(b"\x2c", 13 + 3 * 2 ** ((data[10] & 7) + 1))
    data[frame + 5 : frame + 9] = b"\x00\x28\x00\x28"  # 10240 x 10240
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(MediaError, match=r"too large to decode \(Image size \(104857600 pixels\)"):
            images.read_image(Image(data=bytes(data)))


def test_too_many_bytes_are_refused_before_they_are_read(tmp_path):
    path = tmp_path / "big.png"
    with path.open("wb") as file:
        file.truncate(images.MAX_BYTES + 1_000_000)
    with pytest.raises(MediaError, match="has 101.0 MB, the limit is 100 MB"):
        images.read_image(Image(path=str(path)))
    with pytest.raises(MediaError, match="the limit is 100 MB"):
        images.digest(Image(data=bytes(images.MAX_BYTES + 1)))


def test_what_is_no_picture_is_named(tmp_path):
    others = {
        "notes.png": ("Grüße, liebe Leute".encode() * 40, "is a text file, not a picture; supported are PNG"),
        "p.png": (b"P2P networks are fun", "is a text file"),
        "photo.jpg": (b"\0\0\0\x18ftypheic\0\0", "is a HEIC photo"),
        "paper.png": (b"%PDF-1.7 ...", "is a PDF"),
        "noise.png": (bytes(range(256)), "is of an unknown format"),
        "empty.png": (b"", r"is empty \(0 bytes\); give a picture file"),
    }
    for name, (data, text) in others.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(MediaError, match=f"{name} {text}"):
            images.read_image(Image(path=str(tmp_path / name)))


def test_folder_missing_file_and_device(tmp_path):
    encoded = encode(noise(2, 2)).data
    (tmp_path / "Holiday.png").write_bytes(encoded)
    cases = {
        str(tmp_path): "is a folder; give one picture file in it",
        str(tmp_path / "holidya.png"): r"does not exist; did you mean Holiday.png\?",
        str(tmp_path / "quite-other"): "does not exist; check the path",
        str(tmp_path / "no" / "a.png"): "there is no folder .*no either",
        "/dev/zero": "is not a regular file",
        "a\0b": "cannot be read|does not exist",
        "n" * 5000: "cannot be read",
    }
    for path, text in cases.items():
        with pytest.raises(MediaError, match=text):
            images.read_image(Image(path=path))


def test_loaded_pictures_outlive_their_file(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encode(noise(3, 3)).data)
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    loaded = images.load_image(Image(path=str(path)))
    path.unlink()
    assert loaded.digest == images.digest(loaded) == expected
    assert images.read_image(loaded).size == (3, 3)
    assert loaded.path == str(path)


def test_a_file_that_is_no_longer_the_picture_of_its_digest_is_refused(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encode(noise(3, 3)).data)
    shown = Image(path=str(path), digest=images.digest(Image(path=str(path))))
    assert images.load_image(shown).data == path.read_bytes()
    path.write_bytes(encode(noise(4, 4)).data)
    for read in (images.load_image, images.image_size, images.read_image):
        with pytest.raises(MediaError, match=r"a\.png has changed since it was shown; show it again"):
            read(shown)


def test_a_picture_needs_bytes_or_a_path():
    with pytest.raises(UsageError, match="an image needs data or a path"):
        Image()


@given(
    st.binary(max_size=200), st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"\xff\xd8\xff"])
)
def test_any_bytes_are_a_picture_or_a_media_error(data, start):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert images.read_image(Image(data=start + data)).mode == "RGB"
        except MediaError as error:
            assert error.message and error.remedy


@settings(max_examples=60)
@given(st.data())
def test_damage_anywhere_is_a_picture_or_a_media_error(data):
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]))
    encoded = bytearray(encode(noise(12, 9), kind).data)
    for at in data.draw(st.lists(st.integers(0, len(encoded) - 1), max_size=4)):
        encoded[at] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert images.read_image(Image(data=bytes(encoded))).mode == "RGB"
        except MediaError as error:
            assert error.message and error.remedy


# pixels


CLIP = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
SIGLIP = {"size": {"height": 28, "width": 28}}
SHAPES = [(40, 31), (31, 40), (28, 28), (100, 9), (5, 5), (1, 60)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_plain_pixels_equal_transformers(family, shape, configs):
    theirs = CLIPImageProcessorPil(**CLIP) if family == "clip" else SiglipImageProcessorPil(**SIGLIP)
    ours = images.image_processor_for(configs(family).vision)
    picture = noise(*shape)
    expected = theirs(picture, return_tensors="pt")["pixel_values"][0]
    pixels = images.to_pixels(picture, ours)
    assert pixels.dtype == torch.float32
    assert pixels.shape == (3, 28, 28)
    assert torch.equal(pixels, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_pad_is_a_square_of_the_mean_colour(shape, configs):
    processor = images.image_processor_for(configs("clip").vision)
    height, width = shape
    side = max(shape)
    mean = [int(x * 255) for x in processor.image_mean]
    square = np.full((side, side, 3), mean, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = np.asarray(noise(*shape))
    expected = processor.preprocess(pillow.fromarray(square), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(images.to_pixels(noise(*shape), processor, "pad"), expected)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_resize_is_bicubic_without_crop(family, configs):
    processor = images.image_processor_for(configs(family).vision)
    values = np.asarray(noise(40, 20).resize((28, 28), pillow.Resampling.BICUBIC), np.float32) / 255
    expected = (values - np.array(processor.image_mean)) / np.array(processor.image_std)
    pixels = images.to_pixels(noise(40, 20), processor, "resize")
    assert torch.allclose(pixels, torch.from_numpy(expected).permute(2, 0, 1).float(), atol=1e-5)


def test_stored_preprocessor_config_is_obeyed(configs):
    stored = {"image_processor_type": "SiglipImageProcessor", "image_mean": [0.1] * 3, "resample": 2, **SIGLIP}
    ours = images.image_processor_for(configs("clip").vision, stored)
    theirs = SiglipImageProcessorPil(image_mean=[0.1] * 3, resample=2, **SIGLIP)
    expected = theirs(noise(9, 9), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(images.to_pixels(noise(9, 9), ours), expected)


def test_a_bit_processor_is_a_clip_processor(configs):
    stored = BitImageProcessorPil(image_mean=[0.2] * 3, **CLIP).to_dict()
    for config in (stored, {**CLIP, "image_processor_type": "BitImageProcessor"}):
        ours = images.image_processor_for(configs("siglip").vision, config)
        expected = BitImageProcessorPil.from_dict(dict(config))(noise(40, 31), return_tensors="pt")["pixel_values"][0]
        assert torch.equal(images.to_pixels(noise(40, 31), ours), expected)


@pytest.mark.parametrize("kind", ["CLIPFeatureExtractor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", ""])
def test_older_and_newer_names_of_a_processor_are_known(kind, configs):
    ours = images.image_processor_for(configs("clip").vision, {**CLIP, "feature_extractor_type": kind})
    assert images.target_size(ours) == (28, 28)


@pytest.mark.parametrize(
    "kind", ["ViTImageProcessor", "LlavaImageProcessor", "LlavaNextImageProcessor", "Siglip2ImageProcessor"]
)
def test_a_processor_that_makes_other_pixels_is_refused(kind, configs):
    with pytest.raises(ModelError, match=f"the image processor '{kind}' is not supported; take a model whose"):
        images.image_processor_for(configs("clip").vision, {**CLIP, "image_processor_type": kind})


def test_target_size_must_be_known(configs):
    processor = images.image_processor_for(configs("siglip").vision, {"size": {"shortest_edge": 28}})
    with pytest.raises(ModelError, match="give it height and width"):
        images.target_size(processor)


def test_a_long_strip_does_not_fill_the_memory(configs):
    processor = images.image_processor_for(configs("clip").vision)
    strip = pillow.new("RGB", (200_000, 2), "red")
    with pytest.raises(MediaError, match="200000 x 2 pixels is a strip that would take 78.4 megapixels; crop it"):
        images.to_pixels(strip, processor)
    assert images.to_pixels(strip, processor, "pad").shape == (3, 28, 28)
    assert images.to_pixels(strip, processor, "resize").shape == (3, 28, 28)
