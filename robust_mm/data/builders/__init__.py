"""TFDS builders that turn raw files into array_record data sets.

Prepare and read them through ``robust_mm.data.prepared``, or, once prepared,
with TFDS alone: ``tfds.builder("utd_mhad", data_dir=...,
file_format="array_record").as_data_source(split="train")``. No tensorflow.
"""

import importlib

_BUILDERS = {
  "audioset": "Audioset",
  "av_digits": "AvDigits",
  "imagenet_captions": "ImagenetCaptions",
  "kinetics": "Kinetics",
  "mfeat": "Mfeat",
  "mosi": "Mosi",
  "utd_mhad": "UtdMhad",
}

__all__ = [*_BUILDERS, "builder_class"]  # noqa: PLE0604


def builder_class(name: str) -> type:
  """The builder class of ``"set"`` or ``"set/variant"``; imports TFDS."""
  name = name.split("/")[0]
  module = importlib.import_module(f"robust_mm.data.builders.{name}")
  return getattr(module, _BUILDERS[name])


def __getattr__(name: str):
  if name in _BUILDERS:
    return importlib.import_module(f"robust_mm.data.builders.{name}")
  raise AttributeError(
    f"module 'robust_mm.data.builders' has no attribute {name!r}."
  )
