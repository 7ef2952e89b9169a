"""What there is to predict, in words; imports nothing.

A task is told by the labels: integers ``[n]`` are classes, floats ``[n]``
numbers, and ``[n, k]`` of 0 and 1 says of every class whether it is there.
"""

CLASSIFICATION = "classification"
REGRESSION = "regression"
MULTI_LABEL = "multi_label"

LABELS = {
  CLASSIFICATION: "classes",
  REGRESSION: "numbers (regression)",
  MULTI_LABEL: "several classes at once (multi-label)",
}
PREDICTS = {**LABELS, REGRESSION: "a number (regression)"}
# What models and rows of results are compared by.
MAIN = {CLASSIFICATION: "accuracy", REGRESSION: "mae", MULTI_LABEL: "map"}


def of_labels(labels, num_classes: int) -> str:
  """The task of label arrays; ``num_classes`` is 0 where they are numbers."""
  if labels.ndim == 2:
    return MULTI_LABEL
  return CLASSIFICATION if num_classes else REGRESSION
