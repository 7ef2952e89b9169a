"""Each kind against its closed form, and its damage on real data."""

import numpy as np
import pytest
from corruptions_batches import apply
from corruptions_batches import make
from corruptions_batches import make_batch
from corruptions_batches import of
from corruptions_batches import take

from robust_mm import corruptions
from robust_mm import data


def _distances(kind, inputs, label, **placement):
  """The mean distance to the clean inputs at severity 1 to 5."""
  size = len(label)
  batch = {
    "inputs": inputs,
    "present": {name: np.ones(size, bool) for name in inputs},
    "label": label,
    "id": np.arange(size),
  }
  found = []
  for severity in range(1, 6):
    changed, _ = apply(make(kind, severity, **placement), batch, donors=batch)
    found.append(
      sum(
        np.mean(
          np.linalg.norm(
            np.reshape(np.asarray(changed[n], np.float32) - x, (size, -1)),
            axis=-1,
          )
        )
        for n, x in inputs.items()
      )
    )
  return found


@pytest.mark.parametrize("kind", corruptions.kinds("image"))
def test_damage_grows_with_severity_on_digits(kind):
  batch = data.open_source("digits", "test").batch()
  inputs = {n: np.asarray(x) for n, x in batch["inputs"].items()}
  if kind == "channel_drop":
    inputs = {"pair": np.concatenate(list(inputs.values()), axis=-1)}
  found = _distances(kind, inputs, np.asarray(batch["label"]))
  assert found[0] > 0
  assert np.all(np.diff(found) >= -1e-5)
  assert found[4] > 1.2 * found[0]


@pytest.mark.parametrize("kind", corruptions.kinds("sequence"))
def test_damage_grows_with_severity_on_inertial_sensors(kind, shared_path):
  stored = np.load(shared_path / "data/utd_mhad/utd_mhad.npz")
  inputs = {"inertial": stored["inertial"][::6]}
  found = _distances(kind, inputs, stored["label"][::6].astype(int))
  if kind == "absent":
    assert not any(found)  # the only modality of all examples
    return
  assert found[0] > 0
  if kind == "shift":
    found = found[:2]  # gestures are periodic: later on they come near again
  assert np.all(np.diff(found) >= -1e-5)


def test_additive_noise_has_the_stated_deviation_a_channel():
  value = np.ones((400, 50, 2), np.float32)
  found = of("additive", 4, value, scale={"m": [1.0, 10.0]}) - value
  np.testing.assert_allclose(found.std((0, 1)), [1.5, 15.0], rtol=0.03)
  assert abs(found[..., 0].mean()) < 0.05
  lags = np.corrcoef(found[:200, :, 0].ravel(), found[200:, :, 0].ravel())
  assert abs(lags[0, 1]) < 0.05


def test_scalar_gaussian_is_one_published_factor_an_example():
  value = np.ones((4000, 3), np.float32)
  found = of("scalar_gaussian", 5, value)
  np.testing.assert_array_equal(found, found[:, :1].repeat(3, 1))
  assert abs(found[:, 0].mean()) < 4 / np.sqrt(4000)
  assert 0.46 < np.mean(found[:, 0] < 0) < 0.54
  mild = of("scalar_gaussian", 2, value)
  np.testing.assert_allclose(mild, 0.6 + 0.4 * found, atol=1e-6)


def _gaussian_rows(length, sigma):
  lag = np.arange(length)[:, None] - np.arange(length)[None, :]
  weights = np.exp(-0.5 * (lag / sigma) ** 2)
  return weights / weights.sum(1, keepdims=True)


def test_blur_is_a_convolution_with_a_normalised_kernel():
  rng = np.random.default_rng(0)
  value = rng.normal(size=(3, 20, 4)).astype(np.float32)
  rows = _gaussian_rows(20, 0.35 * np.sqrt(20))
  expected = np.einsum("ij,bjc->bic", rows, value)
  np.testing.assert_allclose(of("blur", 3, value), expected, atol=2e-6)
  image = rng.normal(size=(3, 8, 5, 2)).astype(np.float32)
  down, across = (_gaussian_rows(n, 0.5 * np.sqrt(n)) for n in (8, 5))
  expected = np.einsum("ij,bjkc,lk->bilc", down, image, across)
  np.testing.assert_allclose(of("blur", 4, image), expected, atol=2e-6)
  constant = np.full((1, 9, 9, 1), 3.0, np.float32)
  np.testing.assert_allclose(of("blur", 5, constant), constant, rtol=1e-6)


def test_contrast_and_clipping_have_their_closed_forms():
  value = make_batch()["inputs"]["video"]
  mean = value.mean((1, 2, 3), keepdims=True)
  expected = mean + 0.2 * (value - mean)
  np.testing.assert_allclose(of("contrast", 4, value), expected, atol=1e-5)
  value = make_batch()["inputs"]["sequence"]
  level = 0.3 * np.abs(value).max(1, keepdims=True)
  expected = np.clip(value, -level, level)
  np.testing.assert_allclose(of("clip", 3, value), expected, atol=1e-6)
  value = make_batch()["inputs"]["vector"]
  level = 0.3 * np.abs(value).max(1, keepdims=True)
  expected = np.clip(value, -level, level)
  np.testing.assert_allclose(of("clip", 3, value), expected, atol=1e-6)


def test_band_limiting_is_a_mask_in_the_fourier_domain():
  rng = np.random.default_rng(1)
  value = rng.normal(size=(3, 32, 2)).astype(np.float32)
  spectrum = np.fft.rfft(value, axis=1)
  spectrum[:, np.fft.rfftfreq(32) > 0.15] = 0
  expected = np.fft.irfft(spectrum, 32, axis=1)
  found = of("band_limit", 3, value)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  image = rng.normal(size=(3, 9, 8, 1)).astype(np.float32)
  spectrum = np.fft.fft2(image, axes=(1, 2))
  for axis, length in ((1, 9), (2, 8)):
    high = np.abs(np.fft.fftfreq(length)) > 0.25
    spectrum[(slice(None),) * axis + (high,)] = 0
  expected = np.fft.ifft2(spectrum, axes=(1, 2)).real
  found = of("band_limit", 2, image)
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_shift_moves_by_the_stated_steps_either_way():
  value = np.arange(1, 41, dtype=np.float32).reshape(1, 20, 2).repeat(40, 0)
  later, earlier = np.zeros_like(value[0]), np.zeros_like(value[0])
  later[4:], earlier[:-4] = value[0, :-4], value[0, 4:]
  found = of("shift", 3, value)
  is_later = [np.array_equal(x, later) for x in found]
  is_earlier = [np.array_equal(x, earlier) for x in found]
  assert np.all(np.logical_xor(is_later, is_earlier))
  assert 5 < np.sum(is_later) < 35


def test_occlusion_hides_one_box_of_the_stated_size():
  image = np.ones((20, 10, 20, 2), np.float32)
  for found in of("occlusion", 4, image, strength=0.25):
    rows, columns = np.nonzero(found[..., 0] == 0)
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (5, 10)
    assert len(rows) == 50
    np.testing.assert_array_equal(found[..., 0], found[..., 1])
  hidden = of("occlusion", 3, np.ones((20, 40, 3), np.float32)) == 0
  np.testing.assert_array_equal(hidden.sum((1, 2)), [14 * 3] * 20)


@pytest.mark.parametrize("severity, rate", [(1, 0.1), (3, 0.5), (5, 0.9)])
def test_drops_have_their_rate_and_are_nested(severity, rate):
  value = np.ones((300, 40, 3), np.float32)
  lost = of("frame_drop", severity, value) == 0
  assert np.all(lost == lost[..., :1])
  error = 4 * np.sqrt(rate * (1 - rate) / lost[..., 0].size)
  assert abs(lost.mean() - rate) < error
  assert np.all(lost <= (of("frame_drop", 5, value) == 0))
  tokens = np.full((300, 40), 7)
  found = of("token_drop", severity, tokens, unknown=2)
  assert set(np.unique(found)) == {2, 7}
  assert abs(np.mean(found == 2) - rate) < error
  channels = np.ones((300, 4, 40), np.float32)
  lost = of("channel_drop", severity, channels, strength=rate) == 0
  assert np.all(lost == lost[:, :1])
  assert abs(lost.mean() - rate) < error


def test_a_stuck_sensor_repeats_one_frame_to_the_end():
  value = np.arange(50, dtype=np.float32)[None, :, None].repeat(200, 0)
  found = of("stuck", 3, value)[..., 0]
  last = found[:, -1].astype(int)
  expected = np.minimum(np.arange(50)[None], last[:, None])
  np.testing.assert_array_equal(found, expected)
  assert last.min() >= 25
  assert last.max() <= 38
  assert len(set(last)) > 5


def test_a_swap_takes_a_sample_with_a_different_label_where_there_is_one():
  label = np.array([0] * 6 + [1] * 2)
  value = np.arange(8, dtype=np.float32)[:, None]
  batch = {
    "inputs": {"m": value, "n": value + 10},
    "present": {"m": np.arange(8) != 7, "n": np.ones(8, bool)},
    "label": label,
    "id": np.arange(8),
  }
  found, _ = apply(make("swap", 5), batch)
  donor = np.asarray(found["m"])[:7, 0].astype(int)
  np.testing.assert_array_equal(donor[:6], 6)  # 7 has no such modality
  assert donor[6] in range(6)
  assert np.asarray(found["m"])[7] == 7
  donor = np.asarray(found["n"])[:, 0].astype(int) - 10
  assert np.all(label[donor] != label)
  batch["label"] = np.zeros(8, int)
  found, _ = apply(make("swap", 5), batch)
  assert np.all(np.asarray(found["n"])[:, 0] - 10 != np.arange(8))
  alone, _ = apply(make("swap", 5), take(batch, np.array([2])))
  assert np.asarray(alone["n"])[0, 0] == 12
