"""A head of one output, in units of the label it predicts."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxtyping import Array
from jaxtyping import PRNGKeyArray

from robust_mm import _validate
from robust_mm._types import Outputs
from robust_mm._types import Params
from robust_mm._types import Target
from robust_mm.models import fusion as fusion_lib


@dataclasses.dataclass(frozen=True, eq=False)
class ScaledFusion:
  """``mean + deviation * output`` of a head with ``num_classes=1``.

  It has no classes, so it states no geometry and nothing certifies it.

  Attributes:
    fusion: the head, its parameters are those of this one.
    target: mean and deviation of the label.
  """

  fusion: Any
  target: Target

  def __post_init__(self):
    _validate.positive(deviation=self.target.deviation)
    if self.fusion.num_classes != 1:
      raise ValueError(
        f"num_classes must be 1 with a target, got {self.fusion.num_classes}."
      )

  @property
  def num_classes(self) -> int:
    """1, the prediction."""
    return 1

  def init(
    self, key: PRNGKeyArray, embedding_dims: Mapping[str, int]
  ) -> dict[str, Any]:
    """Parameters of the head."""
    return self.fusion.init(key, embedding_dims)

  def __call__(
    self,
    params: Params,
    embeddings: Mapping[str, Array],
    present: Mapping[str, Array],
  ) -> Outputs:
    """The prediction ``[b, 1]``; no scores, which would have other units."""
    outputs = self.fusion(params, embeddings, present)
    logits = self.target.mean + self.target.deviation * outputs.logits
    return dataclasses.replace(outputs, logits=logits, scores=None)

  def freeze(self, params: Params) -> tuple["ScaledFusion", Params]:
    """The same around the frozen head."""
    head, params = fusion_lib.freeze(self.fusion, params)
    return ScaledFusion(head, self.target), params


def of_task(fusion: Any, target: Target | None) -> Any:
  """The head as it is for classes, in units of the target for a number.

  Raises:
    ValueError: one of both speaks of classes and the other of a number.
  """
  if target is not None:
    return ScaledFusion(fusion, target)
  _validate.at_least(2, num_classes=fusion.num_classes)
  return fusion
