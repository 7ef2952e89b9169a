"""Models of labels that are no single class."""

import dataclasses

from robust_mm import _tasks
from robust_mm._types import Model


def multi_label(model: Model) -> Model:
  r"""The model as one of examples that have any number of the classes.

  .. math:: P(\text{class } k \text{ is there}) = \sigma(z_k)

  of its logits, each for itself. The parameters and the logits are the same;
  it states no geometry, because no certificate is about several classes.

  >>> model = models.multi_label(models.late_fusion(...))   # doctest: +SKIP

  Args:
    model: of at least two classes.

  Raises:
    ValueError: a regression.
  """
  if model.task == _tasks.MULTI_LABEL:
    return model
  model.need_classes("multi_label")

  def freeze(params):
    frozen, params = model.freeze(params)
    return multi_label(frozen), params

  return dataclasses.replace(
    model,
    geometry=None,
    freeze=None if model.freeze is None else freeze,
    multi_label=True,
  )
