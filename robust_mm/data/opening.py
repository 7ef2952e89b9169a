"""Opens a split of any named data set."""

import os
from collections.abc import Sequence

from robust_mm.data import registry
from robust_mm.data import sources


def open_source(
  name: str,
  split: str,
  *,
  path: str | os.PathLike | None = None,
  modalities: Sequence[str] | str | None = None,
  limit: int | None = None,
  num_classes: int | None = None,
) -> sources.Source:
  """A split of a named data set, ready to gather batches from.

  Args:
    name: one of ``registry.list_datasets()``.
    split: ``"train"``, ``"validation"`` or ``"test"``.
    path: for ``arrays`` the folder of npz files; for prepared sets the data
      directory (default ``ROBUST_MM_DATA_DIR``, else ``~/.cache/robust_mm``);
      unused for ``digits`` and ``diabetes``.
    modalities: which to use, a sequence or ``"a,b"``; the data set's default
      ones by default.
    limit: at most so many examples, a fixed subset, balanced over classes.
    num_classes: for ``arrays`` with classes only.

  Returns:
    The source; its ``notes`` are sentences the user should be shown.

  Raises:
    UserError: an unknown name, split or modality; files that are missing,
      damaged or do not fit together; a set that is not prepared, with the
      command that prepares it.
  """
  info = registry.get(name)
  registry.check_split(split)
  if info.kind == "folder":
    from robust_mm.data import arrays

    source = arrays.open_arrays(
      path, split, modalities=modalities, num_classes=num_classes
    )
    return source.limit(limit)
  chosen = registry.choose_modalities(
    name, tuple(sorted(info.modalities)), info.default_modalities, modalities
  )
  if info.kind == "embedded":
    return sources.EMBEDDED[name](split).select(chosen).limit(limit)
  from robust_mm.data import prepared

  return prepared.open_prepared(info, split, path, chosen).limit(limit)


def load(
  name: str,
  *,
  split: str = "test",
  path: str | os.PathLike | None = None,
  modalities: Sequence[str] | str | None = None,
  limit: int | None = None,
) -> dict:
  """A split of a named data set as one batch of numpy arrays.

  >>> load("digits", limit=5)["inputs"]["left"].shape
  (5, 8, 4, 1)

  Arguments and errors are those of ``open_source``; values are those training
  sees, so pixels of ``arrays`` are scaled to [0, 1].
  """
  return open_source(
    name, split, path=path, modalities=modalities, limit=limit
  ).batch()
