"""Prepared sets against their raw files; the log-mel against the stored one."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import sklearn.decomposition
import small_data
import tensorflow_datasets as tfds

from robust_mm import _validate
from robust_mm import data
from robust_mm.data import prepared
from robust_mm.data import registry
from robust_mm.data.builders import av_digits
from robust_mm.data.builders import mosi
from robust_mm.data.builders import utd_mhad

SPLITS = ("train", "validation", "test")
SMALL = ("mfeat", "mosi", "utd_mhad")


def _expected(name, raw):
  """Inputs of a set straight from its raw arrays, in the units promised."""
  if name == "mfeat":
    return {m: raw[m] for m in ("fac", "fou", "kar", "mor", "pix", "zer")}
  if name == "utd_mhad":
    joints = raw["skeleton"] - raw["skeleton"][:, :1, 3:4]
    turned = np.deg2rad(raw["inertial"][..., 3:].astype(np.float64))
    return {
      "depth": raw["depth"][..., None] / np.float32(255),
      "inertial": np.concatenate([raw["inertial"][..., :3], turned], axis=-1),
      "skeleton": joints.reshape(len(joints), 32, 60),
    }
  counts = np.stack([np.bincount(t, minlength=1003) for t in raw["tokens"]])
  occurs = (counts > 0).astype(np.float64)
  occurs[:, 0] = 0
  norm = np.linalg.norm(occurs, axis=1, keepdims=True)
  return {
    "audio": raw["audio_feat"],
    "text": raw["text_feat"],
    "tokens": raw["tokens"],
    "video": raw["video_feat"],
    "words": occurs / np.maximum(norm, 1e-9),
  }


@pytest.mark.parametrize("name", SMALL)
def test_prepared_set_round_trips_the_raw_file(name, data_dir, shared_path):
  raw = dict(np.load(shared_path / "data" / name / f"{name}.npz"))
  info = registry.get(name)
  expected = _expected(name, raw)
  assert set(expected) == set(info.modalities)
  for code, split in enumerate(SPLITS):
    source = data.open_source(
      name, split, path=data_dir, modalities=tuple(info.modalities)
    )
    rows = np.flatnonzero(raw["split"] == code)
    assert len(source) == len(rows) == info.splits[split]
    np.testing.assert_array_equal(source.ids, rows)
    np.testing.assert_array_equal(source.labels, raw["label"][rows])
    batch = source.batch()
    for m, modality in info.modalities.items():
      values = batch["inputs"][m]
      assert values.shape[1:] == modality.shape
      assert values.dtype == modality.dtype
      np.testing.assert_allclose(
        values, expected[m][rows], rtol=2e-6, atol=1e-6
      )
      if modality.value_range:
        low, high = modality.value_range
        assert values.min() >= low
        assert values.max() <= high


def test_utd_mhad_split_is_cross_subject(data_dir):
  subjects = {
    split: set(
      data.open_source("utd_mhad", split, path=data_dir).metadata["subject"]
    )
    for split in SPLITS
  }
  assert subjects == {
    "train": {1, 3, 5},
    "validation": {7},
    "test": {2, 4, 6, 8},
  }


@pytest.mark.parametrize("config", ["", "/speaker_disjoint", "/hard"])
def test_av_digits_pairs_are_those_of_the_raw_files(
  config, data_dir, raw_av_digits
):
  raw = {
    name: dict(np.load(raw_av_digits / f"{name}.npz"))
    for name in ("mnist_images", "fsdd_logmel", "pairs")
  }
  prefix = "spk_" if "speaker" in config else ""
  seen = []
  for split, key in zip(SPLITS, ("train", "val", "test")):
    source = data.open_source(f"av_digits{config}", split, path=data_dir)
    rows = raw["pairs"][prefix + key]
    assert len(source) == small_data.COUNTS[key]
    np.testing.assert_array_equal(source.metadata["image_index"], rows[:, 0])
    np.testing.assert_array_equal(source.metadata["recording"], rows[:, 1])
    np.testing.assert_array_equal(
      source.labels, raw["pairs"][f"{prefix}{key}_label"]
    )
    seen.append(set(rows[:, 1].tolist()))
    if config != "/hard":
      batch = source.batch()
      side = "test_images" if split == "test" else "train_images"
      image = raw["mnist_images"][side][rows[:, 0]][..., None]
      audio = raw["fsdd_logmel"]["logmel"][rows[:, 1]]
      np.testing.assert_array_equal(
        batch["inputs"]["image"], image / np.float32(255)
      )
      np.testing.assert_array_equal(
        batch["inputs"]["audio"], audio / np.float32(255)
      )
  assert not seen[0] & seen[1]
  assert not (seen[0] | seen[1]) & seen[2]


@pytest.mark.parametrize("prefix", ["", "spk_"])
def test_official_pairs_have_the_registry_s_sizes_and_are_disjoint(
  prefix, shared_path
):
  pairs = np.load(shared_path / "data/av_digits/pairs.npz")
  train, validation, test = (
    pairs[prefix + name] for name in ("train", "val", "test")
  )
  sizes = registry.get("av_digits").splits
  assert [len(train), len(validation), len(test)] == list(sizes.values())
  recordings = [set(rows[:, 1].tolist()) for rows in (train, validation, test)]
  assert not recordings[0] & recordings[1]
  assert not (recordings[0] | recordings[1]) & recordings[2]
  assert not set(train[:, 0].tolist()) & set(validation[:, 0].tolist())


def test_speakers_of_the_disjoint_test_set_are_unheard(data_dir):
  speakers = {
    split: set(
      data.open_source(
        "av_digits/speaker_disjoint", split, path=data_dir
      ).metadata["speaker"]
    )
    for split in SPLITS
  }
  assert len(speakers["test"]) == 2
  assert not speakers["test"] & (speakers["train"] | speakers["validation"])


def test_logmel_of_clean_waves_reproduces_the_stored_one(shared_path):
  folder = shared_path / "data/av_digits"
  stored = dict(np.load(folder / "fsdd_logmel.npz"))
  waves = av_digits.read_waves(folder)
  assert len(waves) == 3000
  chosen = np.arange(0, 3000, 37)
  values = av_digits.logmel(
    np.stack([av_digits.fit_length(waves[i]) for i in chosen]),
    stored["mel_filters"],
  )
  low, high = stored["logmel_range"].astype(np.float64)
  np.testing.assert_array_equal(
    av_digits.quantise(values, low, high), stored["logmel"][chosen]
  )


def test_hard_images_are_affine_in_the_leading_components(raw_av_digits):
  images = dict(np.load(raw_av_digits / "mnist_images.npz"))
  images = {side: images[side] for side in ("train_images", "test_images")}
  fitted_on = np.arange(0, len(images["train_images"]), 2)
  reduced = av_digits.reduced_images(images, fitted_on)
  pixels = images["train_images"].reshape(-1, 784) / 255.0
  peer = sklearn.decomposition.PCA(0.25).fit(pixels[fitted_on])
  again = peer.inverse_transform(peer.transform(pixels))
  low, high = again[fitted_on].min(), again[fitted_on].max()
  expected = np.clip((again - low) / (high - low), 0, 1).reshape(-1, 28, 28)
  np.testing.assert_allclose(
    reduced["train_images"] / 255.0, expected, atol=0.51 / 255
  )


def test_hard_noise_has_the_stated_power(monkeypatch, raw_av_digits):
  mels = dict(np.load(raw_av_digits / "fsdd_logmel.npz"))
  waves = av_digits.read_waves(raw_av_digits)
  heard = []
  original = av_digits.logmel
  monkeypatch.setattr(
    av_digits, "logmel", lambda w, f: heard.append(w) or original(w, f)
  )
  values = av_digits.noisy_logmels(raw_av_digits, mels)
  assert values.shape == mels["logmel"].shape
  for wave, noisy in list(zip(waves, heard))[:40]:
    noise = noisy[0] - av_digits.fit_length(wave)
    snr = 10 * np.log10(np.mean(wave**2) / np.mean(noise**2))
    assert abs(snr + 5.0) < 0.3


def test_words_count_presence_without_padding():
  tokens = np.array([[3, 3, 1, 0], [0, 0, 0, 0]])
  expected = np.zeros((2, 5))
  expected[0, [1, 3]] = 2**-0.5
  np.testing.assert_allclose(mosi.words(tokens, 5), expected, rtol=1e-6)


def test_utd_units():
  rates = np.full((1, 2, 6), 180.0, np.float32)
  np.testing.assert_allclose(
    utd_mhad.inertial(rates)[0, 0], [180] * 3 + [np.pi] * 3, rtol=1e-6
  )
  joints = np.random.default_rng(0).normal(size=(2, 3, 20, 3))
  centred = utd_mhad.skeleton(joints).reshape(2, 3, 20, 3)
  np.testing.assert_allclose(centred[:, 0, 3], 0.0, atol=1e-7)
  np.testing.assert_allclose(
    centred[:, 2, 5] - centred[:, 1, 4], joints[:, 2, 5] - joints[:, 1, 4], 1e-5
  )


def test_prepared_set_is_read_by_tfds_alone(data_dir):
  code = f"""
import sys
import tensorflow_datasets as tfds
builder = tfds.builder(
  "av_digits/official", data_dir={str(data_dir)!r}, file_format="array_record"
)
source = builder.as_data_source(split="validation")
example = source[0]
print(len(source), example["inputs"]["audio"].shape, example["id"],
      "tensorflow" in sys.modules, "robust_mm" in sys.modules)
"""
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == "60 (64, 40) 300 False False"


@pytest.mark.parametrize("damage", ["removed", "flipped"])
def test_columns_are_made_again_from_the_records(damage, shared_path, tmp_path):
  data.prepare("mfeat", shared_path / "data/mfeat", tmp_path)
  before = data.load("mfeat", path=tmp_path)
  file = tmp_path / "mfeat/1.0.0/columns/test.inputs.fou.rows.npy"
  if damage == "removed":
    file.unlink()
  else:
    contents = bytearray(file.read_bytes())
    contents[-1] ^= 0xFF
    file.write_bytes(bytes(contents))
  after = data.load("mfeat", path=tmp_path)
  np.testing.assert_array_equal(after["inputs"]["fou"], before["inputs"]["fou"])
  assert file.is_file()


def test_damaged_records_are_refused_by_folder(shared_path, tmp_path):
  folder = data.prepare("mfeat", shared_path / "data/mfeat", tmp_path)
  (folder / "columns/manifest.json").unlink()
  file = next(folder.glob("mfeat-test*"))
  file.write_bytes(file.read_bytes()[:5000])
  with pytest.raises(_validate.UserError, match=r"is damaged .*prepare it"):
    data.load("mfeat", path=tmp_path)


def test_prepare_is_done_once_and_again_on_demand(shared_path, tmp_path):
  source = shared_path / "data/mfeat"
  folder = data.prepare("mfeat", source, tmp_path)
  marker = folder / "marker"
  marker.touch()
  assert data.prepare("mfeat", source, tmp_path) == folder
  assert marker.is_file()
  data.prepare("mfeat", source, tmp_path, overwrite=True)
  assert not marker.exists()
  assert os.listdir(tmp_path) == ["mfeat"]


def test_interrupted_prepare_leaves_nothing(shared_path, tmp_path, monkeypatch):
  def interrupt(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(prepared, "write_columns", interrupt)
  with pytest.raises(KeyboardInterrupt):
    data.prepare("mfeat", shared_path / "data/mfeat", tmp_path)
  assert os.listdir(tmp_path) == []


def _copy_mfeat(shared_path, folder, **changes):
  arrays = dict(np.load(shared_path / "data/mfeat/mfeat.npz"))
  arrays.update({k: v for k, v in changes.items() if v is not None})
  for key in [k for k, v in changes.items() if v is None]:
    del arrays[key]
  np.savez(folder / "mfeat.npz", **arrays)


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"zer": None}, "mfeat.npz has no key 'zer'"),
    ({"zer": np.zeros((2000, 46))}, "'zer' must have shape [n, 47], got"),
    ({"label": np.full(2000, 10)}, "'label' must be integers from 0 to 9"),
    ({"split": np.full(2000, 3)}, "'split' must be integers from 0 to 2"),
    ({"fou": np.array([None])}, "mfeat.npz cannot be read: Object arrays"),
  ],
)
def test_bad_raw_file_is_refused(changes, words, shared_path, tmp_path):
  _copy_mfeat(shared_path, tmp_path, **changes)
  with pytest.raises(_validate.UserError) as caught:
    data.prepare("mfeat", tmp_path, tmp_path / "out")
  assert words in str(caught.value)
  assert list((tmp_path / "out").iterdir()) == []


def test_damaged_raw_file_is_refused_by_its_checksum(shared_path, tmp_path):
  source = shared_path / "data/mfeat"
  contents = bytearray((source / "mfeat.npz").read_bytes())
  sums = (source / "SHA256SUMS").read_text()
  (tmp_path / "SHA256SUMS").write_text(sums)
  (tmp_path / "mfeat.npz").write_bytes(bytes(contents))
  data.prepare("mfeat", tmp_path, tmp_path / "good")
  contents[100_000] ^= 1
  (tmp_path / "mfeat.npz").write_bytes(bytes(contents))
  with pytest.raises(_validate.UserError, match=r"mfeat\.npz is damaged"):
    data.prepare("mfeat", tmp_path, tmp_path / "out")


def test_missing_raw_file_is_refused_by_name(tmp_path):
  with pytest.raises(
    _validate.UserError, match=r"mnist_images\.npz is missing"
  ):
    data.prepare("av_digits/hard", tmp_path, tmp_path / "out")


def test_builders_carry_the_registry_s_version():
  for name in registry.list_datasets():
    info = registry.get(name)
    if info.kind == "prepared":
      module = data.builders.builder_class(name)
      assert str(module.VERSION) == info.version
      assert isinstance(module.VERSION, tfds.core.Version)


def test_data_directory_that_cannot_be_written_is_refused(
  shared_path, tmp_path
):
  blocked = pathlib.Path(tmp_path / "file")
  blocked.write_text("")
  with pytest.raises(_validate.UserError, match="Cannot write data set"):
    data.prepare("mfeat", shared_path / "data/mfeat", blocked / "below")
