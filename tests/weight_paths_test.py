"""The path between two models: what is scored, what is chosen, compilations."""

import math
import types

import evaluation_models as toy
import jax
import numpy as np
import pytest

from robust_mm import _validate
from robust_mm import weight_paths
from robust_mm import weights
from robust_mm.evaluation import sets

PRESENT = {"a": np.array([True] * 6 + [False] * 2), "b": np.zeros(8, bool)}


def point(alpha, matched):
  return weight_paths.Point(alpha=alpha, matched=matched, scores={})


def score(task, logits, label, subset=("a",)):
  return weight_paths._score(
    types.SimpleNamespace(task=task),
    logits,
    {"label": label, "present": PRESENT},
    subset,
  )


def test_a_diverged_class_is_wrong_and_an_absent_one_is_not_counted():
  label = np.array([0, 1, 2, 0, 1, 2, 0, 0])
  logits = np.eye(3)[label]
  logits[6:] = np.nan  # nothing of a
  assert score("classification", logits, label) == 1.0
  logits[1:4] = np.nan
  assert score("classification", logits, label) == 0.5
  assert math.isnan(score("classification", logits, label, ("b",)))
  assert score("classification", logits, label, ("a", "b")) == 0.5


@pytest.mark.parametrize(
  "task, columns", [("multi_label", 3), ("regression", 1)]
)
def test_other_scores_of_a_diverged_model_are_nan(task, columns):
  rng = np.random.default_rng(0)
  label = np.round(rng.random((8, columns)))
  label[0], label[1] = 0, 1
  label = label[:, 0] if task == "regression" else label
  logits = rng.normal(size=(8, columns))
  logits[6:] = np.nan
  assert np.isfinite(score(task, logits, label))
  logits[2] = np.nan
  assert math.isnan(score(task, logits, label))


@pytest.mark.parametrize("higher, best", [(True, 0.9), (False, 0.2)])
def test_the_choice_is_never_nan(higher, best):
  points = [point(0.5, math.nan), point(0.2, 0.1), point(0.9, 0.3)]
  for order in (points, points[::-1]):
    assert weight_paths._choose(order, higher=higher).alpha == best
  with pytest.raises(_validate.UserError, match="no alpha can be chosen"):
    weight_paths._choose(points[:1], higher=higher)


def test_a_path_compiles_once_for_each_shape_of_a_split():
  traces = []
  model = toy.linear_model(traces=traces)
  first, state = model.init(jax.random.key(0))
  last, _ = model.init(jax.random.key(1))
  splits = toy.make_batch(60), toy.make_batch(40)
  for alpha in np.linspace(0, 1, 11):
    params = weights.interpolate(first, last, float(alpha))
    for batch in splits:
      found = sets.logits_by_set(model, params, state, batch)
      expected = toy.logits(params, batch["inputs"], ["left"])
      np.testing.assert_allclose(found["left",], expected, atol=1e-5)
  assert len(traces) == 2
  other = toy.linear_model(traces=traces)
  sets.logits_by_set(other, first, state, splits[0])
  assert len(traces) == 3
