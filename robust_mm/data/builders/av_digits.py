"""MNIST images paired with spoken digits, in three configurations.

Raw files: ``mnist_images.npz`` (``train_images`` uint8 [n, 28, 28],
``test_images``), ``fsdd_logmel.npz`` (``logmel`` uint8 [r, 64, 40],
``logmel_range`` [2], ``mel_filters`` [40, 129], ``speaker`` [r]),
``fsdd_wave.npz`` (``wave`` int16, ``offset`` [r + 1]) and ``pairs.npz``
(``{train,val,test}`` [n, 2]: image and recording, ``{..}_label`` [n]; the same
with prefix ``spk_``). Training and validation images are rows of
``train_images``.
"""

import pathlib

import numpy as np
import tensorflow_datasets as tfds

from robust_mm.data.builders import base
from robust_mm.data.builders import raw

_FRAME = 256
_HOP = 128
_NUM_FRAMES = 64
NUM_SAMPLES = _FRAME + (_NUM_FRAMES - 1) * _HOP
_FLOOR = 1e-6
_HARD_VARIANCE = 0.25
_HARD_SNR_DB = -5.0
_RAW_SPLITS = {"train": "train", "validation": "val", "test": "test"}


class AvDigits(base.ColumnsBuilder):
  """Official split, speaker-disjoint split, and the hard variant."""

  BUILDER_CONFIGS = [  # noqa: RUF012
    tfds.core.BuilderConfig(
      name="official", description="official splits of both sources"
    ),
    tfds.core.BuilderConfig(
      name="speaker_disjoint", description="test speakers unheard in training"
    ),
    tfds.core.BuilderConfig(
      name="hard",
      description="4-component images, audio with noise at -5 dB",
    ),
  ]

  def columns(self, folder: pathlib.Path) -> dict[str, dict[str, np.ndarray]]:
    """Images and log-mels of every pair as uint8, by split."""
    config = self.builder_config.name
    prefix = "spk_" if config == "speaker_disjoint" else ""
    pairs = _pairs(folder / "pairs.npz", prefix)
    images = raw.read(
      folder / "mnist_images.npz",
      {"train_images": (None, 28, 28), "test_images": (None, 28, 28)},
    )
    logmels = raw.read(
      folder / "fsdd_logmel.npz",
      {
        "logmel": (None, _NUM_FRAMES, 40),
        "logmel_range": (2,),
        "mel_filters": (40, _FRAME // 2 + 1),
        "speaker": (None,),
      },
    )
    _check_pairs(folder / "pairs.npz", pairs, images, len(logmels["speaker"]))
    recordings = logmels["logmel"]
    if config == "hard":
      fitted_on = np.unique(pairs["train"]["rows"][:, 0])
      images = reduced_images(images, fitted_on)
      recordings = noisy_logmels(folder, logmels)
    return _columns(pairs, images, recordings, logmels["speaker"])


def _pairs(file: pathlib.Path, prefix: str) -> dict[str, dict]:
  shapes = {}
  for name in _RAW_SPLITS.values():
    shapes[prefix + name] = (None, 2)
    shapes[f"{prefix}{name}_label"] = (None,)
  arrays = raw.read(file, shapes)
  return {
    split: {
      "rows": arrays[prefix + name],
      "label": arrays[f"{prefix}{name}_label"],
    }
    for split, name in _RAW_SPLITS.items()
  }


def _check_pairs(file, pairs, images, num_recordings) -> None:
  for split, pair in pairs.items():
    side = "test_images" if split == "test" else "train_images"
    key = _RAW_SPLITS[split]
    raw.check_codes(file, key, pair["rows"][:, 0], len(images[side]))
    raw.check_codes(file, key, pair["rows"][:, 1], num_recordings)
    raw.check_codes(file, f"{key}_label", pair["label"], 10)


def _columns(pairs, images, recordings, speaker) -> dict[str, dict]:
  columns = {}
  start = 0
  for split, pair in pairs.items():
    side = "test_images" if split == "test" else "train_images"
    image, recording = pair["rows"][:, 0], pair["rows"][:, 1]
    columns[split] = {
      "inputs/image": images[side][image][..., None],
      "inputs/audio": recordings[recording],
      "label": pair["label"].astype(np.int32),
      "id": np.arange(start, start + len(image), dtype=np.int32),
      "metadata/image_index": image.astype(np.int32),
      "metadata/recording": recording.astype(np.int32),
      "metadata/speaker": speaker[recording].astype(np.int32),
    }
    start += len(image)
  return columns


def logmel(waves: np.ndarray, filters: np.ndarray) -> np.ndarray:
  r"""``[r, 8320]`` waves in [-1, 1] -> ``[r, 64, 40]`` log-mel power.

  .. math:: \log(F |\mathrm{rfft}(w \cdot x)|^2 + 10^{-6})

  with a periodic Hann window of 256 samples and hop 128.
  """
  positions = np.arange(_FRAME)
  window = 0.5 - 0.5 * np.cos(2 * np.pi * positions / _FRAME)
  index = np.arange(_NUM_FRAMES)[:, None] * _HOP + positions
  spectra = np.stack(
    [np.abs(np.fft.rfft(wave[index] * window)) ** 2 for wave in waves]
  )
  return np.log(spectra @ filters.astype(np.float64).T + _FLOOR)


def quantise(values: np.ndarray, low: float, high: float) -> np.ndarray:
  """uint8 so that 0 is ``low`` and 255 is ``high``; clipped beyond."""
  unit = np.clip((values - low) / (high - low), 0.0, 1.0)
  return np.round(unit * 255.0).astype(np.uint8)


def read_waves(folder: pathlib.Path) -> list[np.ndarray]:
  """All recordings as float64 in [-1, 1], of their own lengths."""
  arrays = raw.read(
    folder / "fsdd_wave.npz", {"wave": (None,), "offset": (None,)}
  )
  offset = arrays["offset"]
  if offset[0] < 0 or offset[-1] > len(arrays["wave"]):
    raise raw.error(folder / "fsdd_wave.npz", "offset", "leaves the wave")
  if (np.diff(offset) <= 0).any():
    raise raw.error(folder / "fsdd_wave.npz", "offset", "must increase")
  return np.split(arrays["wave"] / 32768.0, offset[1:-1])


def fit_length(wave: np.ndarray) -> np.ndarray:
  """Zero-padded or cut to 1.04 s."""
  cut = wave[:NUM_SAMPLES]
  return np.pad(cut, (0, NUM_SAMPLES - len(cut)))


def noisy_logmels(folder: pathlib.Path, logmels: dict) -> np.ndarray:
  """Log-mels of all recordings after white noise at -5 dB, as uint8.

  The noise power is the mean power of the recording times 10^(5/10); the
  noise is drawn in recording order from ``default_rng(0)``.
  """
  rng = np.random.default_rng(0)
  low, high = logmels["logmel_range"].astype(np.float64)
  quantised = []
  for wave in read_waves(folder):
    power = np.mean(wave**2) * 10 ** (-_HARD_SNR_DB / 10)
    noise = rng.standard_normal(NUM_SAMPLES) * np.sqrt(power)
    noisy = (fit_length(wave) + noise)[None]
    values = logmel(noisy, logmels["mel_filters"])[0]
    quantised.append(quantise(values, low, high))
  if len(quantised) != len(logmels["logmel"]):
    raise raw.error(
      folder / "fsdd_wave.npz", "offset", "has another number of recordings"
    )
  return np.stack(quantised)


def reduced_images(
  images: dict[str, np.ndarray], fitted_on: np.ndarray
) -> dict[str, np.ndarray]:
  """Reconstructions from the leading components with 25 % of the variance.

  Components are fitted on the rows ``fitted_on`` of the training images. The
  reconstruction leaves [0, 1], so it is scaled (not clipped) such that [0, 1]
  spans the training images; the few test values beyond are clipped.
  """
  train = images["train_images"][fitted_on].reshape(len(fitted_on), -1)
  mean = train.mean(axis=0, dtype=np.float64)
  covariance = np.zeros((784, 784))
  for chunk in np.array_split(train, max(1, len(train) // 5000)):
    centred = chunk.astype(np.float64) - mean
    covariance += centred.T @ centred
  variances, vectors = np.linalg.eigh(covariance)
  share = np.cumsum(variances[::-1]) / variances.sum()
  # The fewest components whose share exceeds a quarter.
  count = int(np.searchsorted(share, _HARD_VARIANCE, side="right")) + 1
  basis = vectors[:, ::-1][:, :count].astype(np.float32)
  mean = mean.astype(np.float32)

  def reconstruct(pixels):
    centred = pixels.reshape(len(pixels), -1).astype(np.float32) - mean
    return (centred @ basis) @ basis.T + mean

  fitted = reconstruct(images["train_images"][fitted_on])
  low, high = float(fitted.min()), float(fitted.max())
  return {
    side: quantise(reconstruct(pixels), low, high).reshape(pixels.shape)
    for side, pixels in images.items()
  }
