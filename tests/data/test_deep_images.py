"""Images of more than 8 bits: values on their way to the model, and picture files of 16 bits a channel."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from deep_files import DEFLATE, LZW, NONE, chunk, deep, write_png, write_tiff
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from small_datasets import CPU, folder, pixels, refusal, save

from fdiff.comm import SoloCommunicator
from fdiff.config import Config, DataConfig, ModelConfig, from_dict, to_dict
from fdiff.data import Shard, normalise, open_source
from fdiff.data.decoding import decode, decode_values, read_header
from fdiff.data.images import prepare
from fdiff.data.values import FULL, scale
from fdiff.federation import open_data

MANY = 10**6


def values(path: Path, background: str = "white") -> np.ndarray:
    return decode_values(path, MANY, background)


def opened(data: DataConfig):
    return open_data(Config(data=data, model=ModelConfig(dim_mults=(1, 2))), SoloCommunicator())


# --- values


@settings(max_examples=40)
@given(st.data(), st.sampled_from(["u2", "f2", "f4", "f8"]))
def test_values_keep_their_precision_until_they_are_scaled(data, dtype: str) -> None:
    low, high = sorted(data.draw(st.lists(st.integers(0, 2048), min_size=2, max_size=2, unique=True)))
    inside = st.integers(low, high) if dtype == "u2" else st.floats(low, high, width=16)
    images = data.draw(arrays.arrays(dtype, (3, 1, 2, 2), elements=inside))
    scaled = scale(images, (low, high), str)
    assert scaled.dtype == torch.float32 and scaled.abs().max() <= 1
    expected = (images.astype(np.float64) - low) / (high - low) * 2 - 1
    assert np.abs(scaled.numpy() - expected).max() <= 2**-24
    ends = scale(np.array([[low], [high]], dtype), (low, high), str)
    assert ends.tolist() == [[-1], [1]]


def test_each_of_65536_levels_is_another_value_of_the_model() -> None:
    scaled = scale(np.arange(65536, dtype=np.uint16)[:, None], FULL, str)
    assert len(scaled.unique()) == 65536
    assert torch.equal(normalise(scaled, torch.float64), scaled.double())


@pytest.mark.parametrize(
    ("value", "dtype", "said"),
    [(1.5, "f4", "1.5"), (-0.25, "f8", "-0.25"), (np.nan, "f2", "nan"), (np.inf, "f4", "inf"), (2, "u2", "2")],
)
def test_a_value_outside_the_range_is_named_with_its_image(value, dtype: str, said: str) -> None:
    images = np.zeros((300, 1, 2, 2), dtype)
    images[290, 0, 1, 0] = value
    refusal(lambda: scale(images, (0, 1), lambda row: f"image {row}"), "image 290: has the value " + said, "[0,1]")


def test_a_limit_is_meant_as_the_values_have_it() -> None:
    assert scale(np.array([[0.1]], np.float32), (0, 0.1), str).item() == 1
    assert scale(np.array([[65504]], np.float16), (0, 65504), str).item() == 1


def test_more_than_8_bits_are_resized_in_float32_as_torch_does() -> None:
    images = scale(deep(4, 3, 12, 12), FULL, str)
    resized = prepare(images, 8, 3)
    expected = torch.nn.functional.interpolate(images, (8, 8), mode="bilinear", antialias=True)
    assert torch.allclose(resized, expected, atol=1e-6) and resized.dtype == torch.float32
    assert torch.equal(prepare(images[2:3], 8, 3)[0], resized[2])  # in whatever company
    grey = prepare(images, 12, 1)
    assert torch.allclose(grey[:, 0], images[:, 0] * 0.299 + images[:, 1] * 0.587 + images[:, 2] * 0.114, atol=1e-4)


@pytest.mark.parametrize("channels", [2, 5, 16])
def test_8_bit_images_of_any_number_of_channels_are_resized_as_grey_ones(channels: int) -> None:
    images = torch.from_numpy(pixels(3, channels, 12, 10))
    resized = prepare(images, 8, channels)
    for channel in range(channels):
        assert torch.equal(resized[:, channel : channel + 1], prepare(images[:, channel : channel + 1], 8, 1))


@pytest.mark.parametrize("given_", [[1], [1, 1], [2, 1], [0, 1, 2], [0.0, float("inf")], [0, "a"], [1e30, 1e30 + 1], 5])
def test_a_range_that_is_none_is_refused(given_) -> None:
    refusal(lambda: from_dict({"data": {"range": given_}}), "data.range: ")


def test_a_range_goes_into_a_file_and_back() -> None:
    config = Config(data=DataConfig(range=(0, 4095)))
    assert from_dict(to_dict(config)) == config and to_dict(config)["data"]["range"] == [0, 4095]
    assert (config.data.itemsize, DataConfig().itemsize) == (4, 1)


# --- picture files of 16 bits a channel


@pytest.mark.parametrize("channels", [(), (3,)])
def test_a_png_keeps_its_16_bits(tmp_path: Path, channels, capfd) -> None:
    array = deep(9, 7, *channels)
    write_png(tmp_path / "a.png", array, more=chunk(b"iCCP", b"no\0\0" + zlib.compress(b"profile")))
    expected = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    np.testing.assert_array_equal(values(tmp_path / "a.png"), expected)
    header = read_header(tmp_path / "a.png", MANY)
    assert (header.height, header.width, header.colour, header.deep) == (9, 7, bool(channels), True)
    assert capfd.readouterr() == ("", "")  # of libpng's warnings
    refusal(lambda: decode(tmp_path / "a.png", MANY, "white"), "16 bits a channel", "--data.range [0,65535]")


@pytest.mark.parametrize("kind", ["none", "deflate", "lzw", "deflate predicted", "lzw predicted", "none predicted"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("tile", [None, 16])
@pytest.mark.parametrize("channels", [(), (3,)])
def test_a_tiff_keeps_its_16_bits(tmp_path: Path, kind: str, order: str, tile, channels) -> None:
    """However it is packed. A predictor of what is not packed means nothing."""
    name, _, predicted = kind.partition(" ")
    compression = {"none": NONE, "deflate": DEFLATE, "lzw": LZW}[name]
    array = deep(21, 18, *channels)
    predictor, tags = (2, {}) if predicted and name != "none" else (1, {317: 2} if predicted else {})
    write_tiff(tmp_path / "a.tif", array, compression, predictor, order, tile=tile, tags=tags)
    expected = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    np.testing.assert_array_equal(values(tmp_path / "a.tif"), expected)


def test_white_may_be_0_in_a_tiff(tmp_path: Path) -> None:
    array = deep(8, 8)
    write_tiff(tmp_path / "a.tif", array, tags={262: 0})
    np.testing.assert_array_equal(values(tmp_path / "a.tif")[0], 65535 - array)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_deep_images_are_read_upright(tmp_path: Path, suffix: str, orientation: int) -> None:
    array = deep(6, 4, 3)
    if suffix == ".png":
        write_png(tmp_path / "a.png", array, order=orientation)
    else:
        write_tiff(tmp_path / "a.tif", array, tags={274: orientation})
    save(tmp_path / "8.png", (array >> 8).astype(np.uint8), exif=_exif(orientation))
    expected = np.asarray(decode(tmp_path / "8.png", MANY, "white")).transpose(2, 0, 1)
    np.testing.assert_array_equal(values(tmp_path / f"a{suffix}") >> 8, expected)


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize(("background", "ground"), [("white", 65535), ("black", 0)])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_what_is_transparent_in_16_bits_shows_the_background(tmp_path: Path, suffix, background, ground) -> None:
    array = deep(4, 4, 4)
    array[..., 3] = [0, 65535, 65535, 32768]
    (write_png if suffix == ".png" else write_tiff)(tmp_path / f"a{suffix}", array)
    found = values(tmp_path / f"a{suffix}", background).transpose(1, 2, 0)
    assert (found[:, 0] == ground).all() and (found[:, 1:3] == array[:, 1:3, :3]).all()
    mixed = array[:, 3, :3] * (32768 / 65535) + ground * (32767 / 65535)
    assert np.abs(found[:, 3] - mixed).max() <= 1
    assert read_header(tmp_path / f"a{suffix}", MANY).transparent


def test_grey_with_alpha_of_16_bits_is_read(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", np.full((4, 4, 2), (1234, 65535), np.uint16))
    assert (values(tmp_path / "a.png") == 1234).all() and not read_header(tmp_path / "a.png", MANY).colour


@pytest.mark.parametrize("tags", [{284: 2}, {262: 5}, {339: 2}])
def test_deep_tiffs_of_other_kinds_are_refused(tmp_path: Path, tags: dict[int, int]) -> None:
    """Planes apart, CMYK, signed."""
    write_tiff(tmp_path / "a.tif", deep(4, 4, 3), tags=tags)
    refusal(lambda: values(tmp_path / "a.tif"), str(tmp_path / "a.tif"))


def test_a_damaged_deep_file_is_named_and_nothing_is_printed(tmp_path: Path, capfd) -> None:
    chance = np.random.default_rng(0)
    write_png(tmp_path / "a.png", deep(12, 12, 3))
    write_tiff(tmp_path / "a.tif", deep(12, 12, 3), DEFLATE, 2)
    refused = 0
    for path in (tmp_path / "a.png", tmp_path / "a.tif"):
        whole = path.read_bytes()
        for _ in range(150):
            raw = bytearray(whole)
            for place in chance.integers(len(raw), size=chance.integers(1, 6)):
                raw[place] = chance.integers(256)
            path.write_bytes(raw[: chance.integers(1, len(raw))] if chance.random() < 0.2 else raw)
            try:
                assert values(path).dtype in (np.uint8, np.uint16)
            except Exception as error:
                assert type(error).__name__ == "UserError" and str(path) in str(error) and "\n" not in str(error)
                refused += 1
    assert 100 < refused < 300 and capfd.readouterr() == ("", "")


def test_a_folder_of_16_bit_images_keeps_its_precision(tmp_path: Path) -> None:
    for i in range(3):
        write_png(tmp_path / f"{i}.png", deep(8, 8, seed=i))
    found = opened(DataConfig(dataset="folder", root=str(tmp_path)))
    assert found.config.data.range == FULL and "values from 0 to 65535" in found.notes[1]
    for in_memory in ("always", "never"):
        shard = Shard(found.sources[0], np.array([2, 0]), CPU, in_memory=in_memory, workers=1)
        ((batch, _),) = shard.batches(torch.arange(2), 2)
        back = ((batch.double() + 1) * 32767.5).round().numpy().astype(np.uint16)
        np.testing.assert_array_equal(back[:, 0], [deep(8, 8, seed=2), deep(8, 8)])
    again = opened(found.config.data)
    assert again.config == found.config and again.fingerprints == found.fingerprints
    assert open_source(found.config.data, "train").dtype == torch.float32


def test_8_bit_files_beside_deep_ones_span_the_same_range_or_are_refused(tmp_path: Path) -> None:
    write_png(tmp_path / "0.png", np.full((8, 8), 65535, np.uint16))
    save(tmp_path / "1.png", np.full((8, 8), 255, np.uint8))
    data = DataConfig(dataset="folder", root=str(tmp_path))
    found = opened(data)
    assert (found.sources[0].images([0, 1]) == 1).all() and "1 of them in 8 bits" in found.notes[1]
    narrow = opened(replace(data, range=(0, 65536.0)))
    refusal(lambda: narrow.sources[0].image(1), "data.range", "1.png", "8 bits a channel")
    beyond = replace(data, range=(0, 4095.0))
    refusal(lambda: opened(beyond).sources[0].image(0), "0.png", "65535", "[0,4095]")
    skipping = opened(replace(beyond, on_bad_image="skip", range=(0, 65536.0)))
    assert len(skipping.sources[0]) == 1
    (tmp_path / "0.png").unlink()
    refusal(lambda: opened(replace(data, range=FULL)), "data.range: [0,65535]", "8 bits", "leave it out")


def test_picture_files_have_1_or_3_channels(tmp_path: Path) -> None:
    save(tmp_path / "1.png", pixels(8, 8, 4))
    refusal(lambda: open_source(folder(tmp_path, channels=4), "train"), "data.channels: 4", "1 or 3")
