"""The stream of training batches that a configuration asks for."""

from robust_mm import data
from robust_mm.training import setup as setup_lib
from robust_mm.training import sharding


def training_batches(config, setup: setup_lib.Setup, mesh, *, start: int = 0):
  """Batches of this process, from number ``start`` on, as a grain dataset.

  With ``config.data.unlabelled_splits`` every labelled row is followed by
  ``config.data.unlabelled_ratio`` rows whose label is not to be read.

  Raises:
    UserError: a batch is larger than what it is drawn from.
  """
  index, count = sharding.batch_part(mesh)
  splits = tuple(config.data.unlabelled_splits)
  return data.pipeline(
    setup.train,
    batch_size=config.data.batch_size,
    seed=config.seed,
    start=start,
    process_index=index,
    process_count=count,
    unlabelled=_without_labels(config, splits) if splits else None,
    ratio=config.data.unlabelled_ratio,
  )


def _without_labels(config, splits: tuple[str, ...]):
  """The examples of these splits with all the modalities they have."""
  return data.concatenate([setup_lib.open_split(config, s) for s in splits])
