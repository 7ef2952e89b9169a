"""What builders share: features from the registry, examples from columns.

The TFDS features of an example are ``inputs`` {m: Tensor}, ``label``, ``id``
and ``metadata``; a builder says only how raw files become such columns.
"""

import abc
import pathlib

import numpy as np
import tensorflow_datasets as tfds

from robust_mm.data import registry
from robust_mm.data.builders import raw


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A TFDS builder of a data set of the registry."""

  VERSION = tfds.core.Version("1.0.0")
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    "Give the folder with the raw npz files: robust-mm data prepare NAME "
    "--source=DIR."
  )
  # No URLs, so no checksum file to look for; looking would need the package
  # importlib_resources, which TFDS does not ask for on new Pythons.
  code_path = None

  @property
  def dataset(self) -> registry.DatasetInfo:
    """The registry's entry of this builder and configuration."""
    config = self.builder_config.name if self.builder_config else ""
    return registry.of_builder(self.name, config)

  def _info(self) -> tfds.core.DatasetInfo:
    return self._described()

  def _described(self, metadata=None) -> tfds.core.DatasetInfo:
    dataset = self.dataset

    def tensor(shape, dtype, encoding="none"):
      return tfds.features.Tensor(
        shape=shape, dtype=np.dtype(dtype), encoding=encoding
      )

    features = {
      "inputs": {
        name: tensor(modality.shape, modality.stored, "zlib")
        for name, modality in dataset.modalities.items()
      },
      "label": tensor((dataset.num_classes,), "bool")
      if dataset.multi_label
      else tensor((), "int32"),
      "id": tensor((), "int32"),
    }
    if dataset.metadata:
      features["metadata"] = {
        name: tensor((), "int32") for name in dataset.metadata
      }
    return tfds.core.DatasetInfo(
      builder=self,
      description=" ".join((dataset.description, *dataset.notes)),
      features=tfds.features.FeaturesDict(features),
      citation=dataset.citation,
      license=dataset.licence,
      disable_shuffling=True,
      metadata=metadata,
    )


class ColumnsBuilder(Builder, skip_registration=True):
  """A TFDS builder whose examples are rows of columns in memory."""

  @abc.abstractmethod
  def columns(self, folder: pathlib.Path) -> dict[str, dict[str, np.ndarray]]:
    """``{split: {feature: [n, ...]}}``, features named ``inputs/<m>`` etc."""

  def _split_generators(self, dl_manager):
    folder = pathlib.Path(dl_manager.manual_dir)
    raw.verify(folder, self.dataset.raw_files)
    return {
      split: self._generate_examples(columns)
      for split, columns in self.columns(folder).items()
    }

  def _generate_examples(self, columns):
    for row in range(len(columns["label"])):
      example = {"inputs": {}}
      for feature, values in columns.items():
        group, _, name = feature.partition("/")
        if name:
          example.setdefault(group, {})[name] = values[row]
        else:
          example[group] = values[row]
      yield row, example
