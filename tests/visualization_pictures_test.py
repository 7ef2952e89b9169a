"""Grids and PNG files, read back by a reader of our own."""

import json
import struct
import zlib

import numpy as np
import pytest

from robust_mm import visualization
from robust_mm.visualization import colours
from robust_mm.visualization import drawing


def read(content):
  """Independent of the writer: chunks, checksums, filter 0."""
  assert content[:8] == bytes([137, 80, 78, 71, 13, 10, 26, 10])
  at, found = 8, {}
  while at < len(content):
    (size,) = struct.unpack(">I", content[at : at + 4])
    name = content[at + 4 : at + 8]
    body = content[at + 8 : at + 8 + size]
    (check,) = struct.unpack(">I", content[at + 8 + size : at + 12 + size])
    assert zlib.crc32(name + body) == check
    found[name] = found.get(name, b"") + body
    at += 12 + size
  assert list(found) == [b"IHDR", b"IDAT", b"IEND"]
  width, height, depth, kind, *rest = struct.unpack(">IIBBBBB", found[b"IHDR"])
  assert (depth, rest) == (8, [0, 0, 0])
  channels = {0: 1, 2: 3}[kind]
  raw = np.frombuffer(zlib.decompress(found[b"IDAT"]), np.uint8)
  raw = raw.reshape(height, 1 + width * channels)
  assert not raw[:, 0].any()
  pixels = raw[:, 1:]
  return pixels if channels == 1 else pixels.reshape(height, width, 3)


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (17, 40), (64, 65)])
@pytest.mark.parametrize("channels", [(), (3,)])
def test_png_is_read_back_as_it_was_written(tmp_path, size, channels):
  array = np.random.default_rng(0).integers(0, 256, (*size, *channels))
  array = array.astype(np.uint8)
  path = visualization.write_png(
    tmp_path / "x.png", array, value_range=(-1, 2), settings={"of": "noise"}
  )
  np.testing.assert_array_equal(read(path.read_bytes()), array)
  told = json.loads(path.with_suffix(".json").read_text())
  assert told == {"of": "noise", "value_range": [-1.0, 2.0]}


def test_matplotlib_reads_the_same_png(tmp_path):
  from matplotlib import image

  array = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
  path = visualization.write_png(tmp_path / "x.png", array)
  found = np.rint(image.imread(path)[..., :3] * 255).astype(np.uint8)
  np.testing.assert_array_equal(found, array)
  assert not path.with_suffix(".json").exists()


@pytest.mark.parametrize(
  "array, word",
  [
    (np.zeros((2, 2)), "uint8"),
    (np.zeros((2, 2), np.int32), "uint8"),
    (np.zeros((2, 2, 4), np.uint8), "h, w, 3"),
    (np.zeros(4, np.uint8), "h, w"),
    (np.zeros((0, 3), np.uint8), "h, w"),
    ([[0]], "uint8"),
  ],
)
def test_what_is_no_picture_is_refused_and_never_rescaled(array, word):
  with pytest.raises(ValueError, match=word):
    visualization.png(array)


def test_path_must_end_in_png(tmp_path):
  with pytest.raises(ValueError, match="path"):
    visualization.write_png(tmp_path / "x.jpg", np.zeros((2, 2), np.uint8))


def test_grid_with_a_partial_last_row_has_the_right_shape_and_places():
  inputs = np.linspace(0, 1, 5)[:, None, None] * np.ones((5, 4, 6))
  found = visualization.grid(inputs, num_columns=3, upscale=2)
  assert found.shape == (2 * (4 * 2 + 2) - 2, 3 * (6 * 2 + 2) - 2)
  assert found.dtype == np.uint8
  assert np.all(found[:8, :12] == 0)
  assert np.all(found[:8, 14:26] == 64)
  assert np.all(found[10:, 14:26] == 255)
  assert np.all(found[10:, 28:] == 255)  # nothing there
  assert np.all(found[8:10] == 255)


def test_one_range_serves_the_whole_grid_and_cuts_what_is_outside():
  inputs = np.array([-9.0, -1.0, 0.0, 1.0, 9.0])[:, None, None, None]
  found = visualization.grid(inputs, 5, 1, value_range=(-1, 1))
  assert found[0, ::3].tolist() == [0, 0, 128, 255, 255]
  with pytest.raises(ValueError, match="value_range"):
    visualization.grid(inputs, 5, value_range=(1, 1))


def test_grid_takes_classes_and_seeds_and_colours():
  inputs = np.random.default_rng(0).random((2, 3, 5, 4, 1))
  assert visualization.grid(inputs, 3, 1).shape == (2 * 7 - 2, 3 * 6 - 2)
  coloured = visualization.grid(inputs, 3, 1, colormap="perceptual")
  assert coloured.shape == (12, 16, 3)
  rgb = visualization.grid(np.zeros((2, 5, 4, 3)), 2, 1)
  assert rgb.shape == (5, 10, 3)
  for bad in ({"num_columns": 0}, {"num_columns": 1, "colormap": "jet"}):
    with pytest.raises(ValueError, match=next(reversed(bad))):
      visualization.grid(inputs, **bad)


def test_colour_table_rises_in_lightness():
  table = colours.table().astype(float)
  assert table.shape == (256, 3)
  lightness = table @ [0.2126, 0.7152, 0.0722]
  assert lightness[0] == 0
  assert lightness[-1] == pytest.approx(255)
  # Up to half a level that rounding takes from each colour.
  assert np.all(np.diff(lightness) > -0.5)
  assert np.all(lightness[4:] > lightness[:-4])


@pytest.mark.parametrize(
  "kind, shape",
  [
    ("image", (8, 6, 1)),
    ("image", (8, 6, 3)),
    ("log_mel", (12, 5)),
    ("inertial", (30, 6)),
    ("skeleton", (16, 60)),
    ("skeleton", (16, 20, 3)),
    ("depth", (8, 6, 5, 1)),
    ("depth", (8, 6)),
    ("vector", (9,)),
  ],
)
def test_every_kind_has_a_picture_that_shows_what_changes(kind, shape):
  x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  found = drawing.draw(x, kind, (-3.0, 3.0))
  other = drawing.draw(x[::-1], kind, (-3.0, 3.0))
  visualization.png(found)
  assert found.shape == other.shape
  assert not np.array_equal(found, other)


@pytest.mark.parametrize(
  ("kind", "shape"), [("inertial", (30, 6)), ("skeleton", (30, 4, 3))]
)
def test_lines_of_one_range_compare_in_height(kind, shape):
  rising = np.linspace(-1, 1, 30).reshape(30, *[1] * (len(shape) - 1))
  high = np.array([1, 1, 1, 4, 4, 4.0] if kind == "inertial" else [1, 1, 4.0])

  def heights(x):
    found = drawing.draw(x, kind, (-high, high))
    coloured = np.any(found != found[..., :1], axis=-1).any(axis=1)
    return coloured.reshape(-1, 48).sum(axis=1) / 48

  whole, half = (heights(size * rising * np.ones(shape)) for size in (1, 0.5))
  wanted = np.array([1, 0.25] if kind == "inertial" else [1, 1, 0.25])
  np.testing.assert_allclose(whole, wanted, atol=0.05)
  np.testing.assert_allclose(half, wanted / 2, atol=0.05)
  # What lies outside of the range is at its end.
  np.testing.assert_allclose(heights(9 * rising * np.ones(shape)), 1)


def test_spectrogram_has_time_to_the_right_and_pitch_up():
  x = np.zeros((7, 5))
  x[6, 0] = 1.0  # late and low
  found = drawing.draw(x, "log_mel", (0.0, 1.0))
  assert np.argwhere(found).tolist() == [[4, 6]]
