"""What is known of a data set and of a modality of it.

Imports nothing but the standard library.
"""

import dataclasses
from collections.abc import Mapping

from robust_mm import _tasks


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModalityInfo:
  """One modality of a data set, as models see it.

  Attributes:
    shape: of one example; None in it where the records say.
    kind: ``"image"`` [h, w, c], ``"spectrogram"`` [t, d], ``"sequence"``
      [t, d], ``"video"`` [t, h, w, c], ``"vector"`` [d] or ``"tokens"`` [t].
    dtype: of the values a model gets.
    value_range: ``(low, high)`` all values lie in, or None where there is no
      natural range.
    stored: dtype on disk; a value is ``stored / divisor``.
    divisor: see ``stored``.
    unit: what a value means.
  """

  shape: tuple[int | None, ...]
  kind: str
  dtype: str = "float32"
  value_range: tuple[float, float] | None = None
  stored: str = "float32"
  divisor: float = 1.0
  unit: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetInfo:
  """A named data set.

  Attributes:
    name: as given to ``data.load``; a variant is ``"set/variant"``.
    description: one sentence.
    modalities: ``{name: ModalityInfo}``; empty for ``arrays``, whose files say.
    num_classes: 0 where labels are numbers (regression), None where the files
      or the prepared records say.
    class_names: one per class, or empty.
    splits: ``{split: number of examples}``; empty where the files say.
    default_modalities: what ``modalities=None`` means; empty where the files
      say.
    kind: ``"embedded"`` (ships with scikit-learn), ``"prepared"`` (made once by
      ``robust-mm data prepare``) or ``"folder"`` (the user's own files).
    origin: where the data come from.
    licence: one line.
    citation: one line.
    notes: what a user has to know before believing a number.
    raw_files: the files ``prepare`` reads, for a prepared set.
    config: name of the TFDS configuration, or empty.
    version: of the prepared form.
    metadata: names of the integers kept beside every example.
    multi_label: whether an example has any number of the classes.
    measured: whether the records of a prepared set say its shapes, classes and
      sizes, which ``prepared.describe`` fills in.
  """

  name: str
  description: str
  modalities: Mapping[str, ModalityInfo]
  num_classes: int | None
  class_names: tuple[str, ...] = ()
  splits: Mapping[str, int]
  default_modalities: tuple[str, ...]
  kind: str
  origin: str
  licence: str
  citation: str = ""
  notes: tuple[str, ...] = ()
  raw_files: tuple[str, ...] = ()
  config: str = ""
  version: str = "1.0.0"
  metadata: tuple[str, ...] = ()
  multi_label: bool = False
  measured: bool = False

  @property
  def task(self) -> str:
    """As ``Model.task`` says it; of ``folder`` the files say."""
    if self.multi_label:
      return _tasks.MULTI_LABEL
    regression = self.num_classes == 0
    return _tasks.REGRESSION if regression else _tasks.CLASSIFICATION

  @property
  def builder_name(self) -> str:
    """Name of the TFDS builder, without the configuration."""
    return self.name.split("/")[0]

  @property
  def folder(self) -> str:
    """Where a prepared set lies below the data directory."""
    parts = (self.builder_name, self.config, self.version)
    return "/".join(part for part in parts if part)
