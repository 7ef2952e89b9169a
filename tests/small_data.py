"""The real data sets prepared for tests, av_digits cut to a few hundred pairs.

Prepared once for all workers of a test session.
"""

import fcntl
import pathlib

import numpy as np

from robust_mm import data
from robust_mm.data import registry

COUNTS = {"train": 300, "val": 60, "test": 120}


def raw_av_digits(source, folder):
  """The first pairs of every split with the images and recordings they use."""
  images = dict(np.load(source / "mnist_images.npz"))
  mels = dict(np.load(source / "fsdd_logmel.npz"))
  waves = dict(np.load(source / "fsdd_wave.npz"))
  pairs = dict(np.load(source / "pairs.npz"))
  cut = {}
  for prefix in ("", "spk_"):
    for split, count in COUNTS.items():
      cut[prefix + split] = pairs[prefix + split][:count]
      name = f"{prefix}{split}_label"
      cut[name] = pairs[name][:count]
  rows = {n: v for n, v in cut.items() if not n.endswith("label")}
  recordings = np.unique(np.concatenate([v[:, 1] for v in rows.values()]))
  for side, is_test in (("train_images", False), ("test_images", True)):
    chosen = [n for n in rows if n.endswith("test") == is_test]
    used = np.unique(np.concatenate([rows[n][:, 0] for n in chosen]))
    images[side] = images[side][used]
    for name in chosen:
      image = np.searchsorted(used, rows[name][:, 0])
      recording = np.searchsorted(recordings, rows[name][:, 1])
      cut[name] = np.stack([image, recording], 1).astype(np.int32)
  offset = waves["offset"]
  pieces = [waves["wave"][offset[i] : offset[i + 1]] for i in recordings]
  lengths = np.cumsum([0, *map(len, pieces)])
  np.savez(folder / "mnist_images.npz", **images)
  np.savez(
    folder / "fsdd_wave.npz",
    wave=np.concatenate(pieces),
    offset=lengths.astype(np.int32),
  )
  np.savez(
    folder / "fsdd_logmel.npz",
    logmel=mels["logmel"][recordings],
    speaker=mels["speaker"][recordings],
    logmel_range=mels["logmel_range"],
    mel_filters=mels["mel_filters"],
  )
  np.savez(folder / "pairs.npz", **cut)


def prepare_all(shared: pathlib.Path, root: pathlib.Path) -> pathlib.Path:
  """Every prepared data set below ``root``, by whichever worker comes first."""
  root.mkdir(parents=True, exist_ok=True)
  raw, folder, done = root / "raw", root / "data", root / "done"
  with (root / "lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if done.exists():
      return root
    raw.mkdir(exist_ok=True)
    raw_av_digits(shared / "data/av_digits", raw)
    for name in registry.list_datasets():
      info = registry.get(name)
      if info.kind == "prepared" and not info.measured:
        cut = info.builder_name == "av_digits"
        source = raw if cut else shared / "data" / name
        data.prepare(name, source, folder, progress=False)
    done.touch()
  return root
