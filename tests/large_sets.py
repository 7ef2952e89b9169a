"""Made-up extractions in the format of the builders of large sets."""

import csv
import pathlib

import numpy as np

SIZES = {"train": 12, "validation": 5, "test": 7}
SHAPES = {
  "audioset": {"audio": (6, 4), "video": (2, 5, 5, 3)},
  "imagenet_captions": {"caption": (5,), "image": (6, 6, 3)},
  "kinetics": {"audio": (6, 4), "video": (2, 5, 5, 3)},
}
MIDS = ("/m/09x0r", "/t/dd00088", "/m/04rlf", "/m/0dgw9r")
NAMES = ("Speech", "Gush", "Music", "Human, sounds")
# The three lines that AudioSet's lists begin with, and the last is the header.
_HEAD = (
  "# Segments csv created Sun Mar  5 10:54:31 2017\n"
  "# num_ytids=12, num_segs=12, num_unique_labels=4, num_positive_labels=20\n"
  "# YTID, start_seconds, end_seconds, positive_labels\n"
)


def arrays(name, rng, k=None):
  """``{modality: array}`` of one example, which tell its first class."""
  found = {}
  for modality, shape in SHAPES[name].items():
    if modality == "caption":
      value = rng.integers(1, 9, shape).astype(np.int32)
      value[-1] = 0
      value[0] = 9  # in every split, so that none exceeds train
    elif modality == "audio":
      value = rng.normal(size=shape).astype(np.float16)
      value[:, 0] += 0 if k is None else k
    else:
      value = rng.integers(0, 256, shape).astype(np.uint8)
    found[modality] = value
  return found


def make(name: str, folder: pathlib.Path, sizes=None, seed: int = 0) -> dict:
  """Writes an extraction; returns ``{split: [(stem, classes, arrays)]}``."""
  rng = np.random.default_rng(seed)
  sizes = sizes or SIZES
  folder.mkdir(parents=True, exist_ok=True)
  columns = {
    "audioset": ("index", "mid", "display_name"),
    "imagenet_captions": ("index", "wnid", "name"),
    "kinetics": ("index", "name"),
  }[name]
  keys = {"kinetics": NAMES}.get(name, MIDS)
  with (folder / "classes.csv").open("w", newline="") as opened:
    writer = csv.writer(opened)
    writer.writerow(columns)
    for index, (key, shown) in enumerate(zip(keys, NAMES)):
      writer.writerow((index, key, shown)[: len(columns)])
  made = {}
  for split, size in sizes.items():
    (folder / split).mkdir()
    made[split] = [
      _example(name, split, number, rng, folder) for number in range(size)
    ]
    _write_list(name, folder / f"{split}.csv", made[split], keys)
  return made


def _example(name, split, number, rng, folder):
  first = number % len(MIDS)
  classes = [first]
  if name == "audioset":
    classes += [
      k for k in range(len(MIDS)) if k != first and rng.random() < 0.3
    ]
  stem = {
    "audioset": f"-{split}_{number:04d}",
    "imagenet_captions": f"n0{split}_{number}",
    "kinetics": f"-{split}{number}_{number:06d}_{number + 10:06d}",
  }[name]
  content = arrays(name, rng, first)
  np.savez(folder / split / f"{stem}.npz", **content)
  return stem, sorted(classes), content


def _write_list(name, file, examples, keys):
  with file.open("w", newline="") as opened:
    if name == "audioset":
      opened.write(_HEAD)
      for stem, classes, _ in examples:
        mids = ",".join(keys[k] for k in classes)
        opened.write(f'{stem}, 30.000, 40.000, "{mids}"\n')
      return
    writer = csv.writer(opened)
    if name == "kinetics":
      writer.writerow(
        ("label", "youtube_id", "time_start", "time_end", "split", "is_cc")
      )
    else:
      writer.writerow(("filename", "wnid"))
    for stem, classes, _ in examples:
      key = keys[classes[0]]
      if name == "kinetics":
        video, start, end = stem.rsplit("_", 2)
        writer.writerow((key, video, int(start), int(end), file.stem, 0))
      else:
        writer.writerow((f"{stem}.JPEG", key))
