"""Apache Beam, where it is installed: records of large sets made in parallel.

It is an extra (``pip install 'robust_mm[beam]'``) and imported when asked for
only. Tried with Beam's runner for one machine; a cluster's needs a source and a
data directory that all workers see under the same names.
"""

import contextlib
import importlib.util
import logging
from collections.abc import Sequence

from robust_mm import _validate
from robust_mm.data import registry


def check(info: registry.DatasetInfo, options: Sequence[str] | None) -> None:
  """Refuses a pipeline that is asked for and cannot be.

  Raises:
    UserError: apache_beam is not installed, or the set has no use for it.
  """
  if options is None:
    return
  if not info.measured:
    raise _validate.UserError(
      f"Data set {info.name!r} has a file for all of it and needs no Beam "
      "pipeline; leave --beam out."
    )
  if importlib.util.find_spec("apache_beam") is None:
    raise _validate.UserError(
      "--beam needs Apache Beam, which is not installed: pip install "
      "'robust_mm[beam]', or leave it out."
    )


def download_config(options: Sequence[str] | None) -> dict:
  """Arguments of TFDS's ``DownloadConfig`` for a pipeline; none without."""
  if options is None:
    return {}
  from apache_beam.options import pipeline_options

  return {"beam_options": pipeline_options.PipelineOptions(list(options))}


@contextlib.contextmanager
def refusals(options: Sequence[str] | None):
  """Inside, what a worker refuses comes out as the one sentence it said.

  A pipeline adds a trace and its own words to it.
  """
  if options is None:
    yield
    return
  logger = logging.getLogger("apache_beam")
  level = logger.level
  if not options:  # a cluster's log is of use
    logger.setLevel(logging.CRITICAL)
  try:
    yield
  except Exception as error:
    text = str(error)
    if not isinstance(error, _validate.UserError) and "UserError: " not in text:
      raise
    text = text.rpartition("UserError: ")[2].partition(" [while running")[0]
    raise _validate.UserError(text.strip().splitlines()[0]) from None
  finally:
    logger.setLevel(level)
