"""Methods of a study that train nothing, against numpy, with absent inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_mm import models
from robust_mm import shift_derived
from robust_mm.evaluation import sets
from robust_mm.evaluation import shift_scores

NAN = np.nan
SHAPES = {"a": (4,), "b": (3,)}
TESTS = [("a",), ("b",), ("a", "b")]


@pytest.fixture(name="model", scope="module")
def _model():
  model = models.token_transformer(
    SHAPES, 4, width=8, num_layers=1, num_heads=2
  )
  return model, *model.init(jax.random.key(0))


def split(rows_a, rows_b, label, seed):
  """Inputs of random numbers, NaN where they are absent."""
  rng = np.random.default_rng(seed)
  present = {"a": np.array(rows_a, bool), "b": np.array(rows_b, bool)}
  inputs = {
    name: np.where(
      present[name][:, None], rng.normal(size=(len(label), *shape)), NAN
    ).astype("f4")
    for name, shape in SHAPES.items()
  }
  return {"inputs": inputs, "present": present, "label": np.array(label)}


# Class 2 has only a row without a, class 3 none at all.
TRAIN = split([1, 1, 1, 1, 0, 1], [1, 0, 1, 0, 1, 1], [0, 0, 1, 1, 2, 0], 1)
TEST = split([1, 1, 0, 0, 1], [1, 0, 1, 0, 1], [0, 1, 2, 3, 0], 2)


def pooled(model, batch, row, subset):
  """The features of one example, which has something of a set; float64."""
  model, params, state = model
  inputs = {m: np.nan_to_num(x[[row]]) for m, x in batch["inputs"].items()}
  there = {
    m: jnp.asarray(flag[[row]] & (m in subset))
    for m, flag in batch["present"].items()
  }
  embeddings, _ = model.encode(params, state, inputs, there, train=False)
  found = model.features(params, embeddings, there)
  return np.asarray(found, np.float64)[0]


def expected(model, members, labelled, test_sets):
  """``{E: [n, k]}`` by loops; ``members[k]``: rows of the training set."""
  rows = sorted({row for own in members for row in own})
  given = {row: pooled(model, TRAIN, row, labelled) for row in rows}
  centre = sum(given.values()) / len(rows)

  def unit(x):
    return x / np.linalg.norm(x)

  means = [
    unit(sum(unit(given[row] - centre) for row in own)) if own else None
    for own in members
  ]
  found = {}
  for subset in test_sets:
    found[subset] = np.full((5, 4), NAN)
    for row in range(5):
      if any(TEST["present"][m][row] for m in subset):
        query = unit(pooled(model, TEST, row, subset) - centre)
        found[subset][row] = [
          -np.inf if mean is None else query @ mean for mean in means
        ]
  return found


def class_means(model, train, labelled, batch_size=2):
  return shift_derived.class_means(
    *model, train, TEST, labelled, TESTS, batch_size=batch_size
  )


@pytest.mark.parametrize(
  "labelled, members",
  [
    (("a",), [[0, 1, 5], [2, 3], [], []]),
    (("b",), [[0, 5], [2], [4], []]),
    (("a", "b"), [[0, 1, 5], [2, 3], [4], []]),
  ],
)
def test_class_means_are_those_of_rows_with_something_of_t(
  model, labelled, members
):
  found = class_means(model, TRAIN, labelled)
  wanted = expected(model, members, labelled, TESTS)
  assert found.keys() == wanted.keys()
  for subset, value in wanted.items():
    np.testing.assert_allclose(found[subset], value, atol=1e-5)
  # Where cosines of the classes there are lie below 0, 0 would have won.
  known = found["a", "b"][[0, 1, 2, 4]]
  chosen = shift_scores.predictions(known)
  assert {*chosen} <= {k for k, own in enumerate(members) if own}


def test_a_row_without_anything_of_t_changes_no_class_mean(model):
  """CLS alone has features too."""
  without = {
    name: {m: x[[0, 1, 2, 3, 5]] for m, x in part.items()}
    if isinstance(part, dict)
    else part[[0, 1, 2, 3, 5]]
    for name, part in TRAIN.items()
  }
  first = class_means(model, TRAIN, ("a",), batch_size=6)
  second = class_means(model, without, ("a",), batch_size=6)
  for subset, value in first.items():
    np.testing.assert_allclose(value, second[subset], atol=1e-6)


def test_classes_of_several_labels_have_means_of_all_their_rows(model):
  label = np.zeros((6, 4), bool)
  members = [[0, 1, 3], [1, 2, 5], [], []]
  for k, own in enumerate(members):
    label[own, k] = True
  label[4, 2] = True  # the row without a
  # A row without any label is part of the centre.
  label[2] = False
  members[1] = [1, 5]
  found = class_means(model, {**TRAIN, "label": label}, ("a",))
  rows = [0, 1, 2, 3, 5]
  given = {row: pooled(model, TRAIN, row, ("a",)) for row in rows}
  centre = sum(given.values()) / 5
  units = {
    r: (x - centre) / np.linalg.norm(x - centre) for r, x in given.items()
  }
  query = pooled(model, TEST, 1, ("a",)) - centre
  for k in (0, 1):
    mean = sum(units[row] for row in members[k])
    cosine = query @ mean / np.linalg.norm(query) / np.linalg.norm(mean)
    np.testing.assert_allclose(found["a",][1, k], cosine, atol=1e-5)
  assert np.all(found["a",][1, 2:] == -np.inf)


def test_a_training_set_without_anything_of_t_is_refused(model):
  none = {**TRAIN["present"], "a": np.zeros(6, bool)}
  with pytest.raises(ValueError, match=r"any of labelled \(a\)"):
    class_means(model, {**TRAIN, "present": none}, ("a",))


def test_all_methods_say_nan_for_the_same_rows(model):
  """Of those that have nothing of E, whether or not T is in E."""
  trained = sets.logits_by_set(*model, TEST, sets=TESTS, batch_size=5)
  prior = np.log(np.full(4, 0.25))
  for labelled in TESTS:
    others = (
      class_means(model, TRAIN, labelled),
      shift_derived.ensemble(
        {(m,): trained[m,] for m in labelled},
        TESTS,
        prior,
        present=TEST["present"],
      ),
    )
    for subset, said in trained.items():
      empty = ~np.any([TEST["present"][m] for m in subset], axis=0)
      assert empty.any()
      for found in (said, *(other[subset] for other in others)):
        np.testing.assert_array_equal(
          np.isnan(found), np.broadcast_to(empty[:, None], found.shape)
        )


def test_an_ensemble_says_the_prior_only_of_what_is_there():
  single = {("a",): np.array([[1.0, 0.0], [NAN, NAN], [NAN, NAN]])}
  present = {
    "a": np.array([True, False, False]),
    "b": np.array([True, True, False]),
  }
  prior = np.log([0.3, 0.7])
  found = shift_derived.ensemble(single, TESTS, prior, present=present)
  said = np.log(np.exp([1.0, 0.0]) / np.exp([1.0, 0.0]).sum())
  nothing = [NAN, NAN]
  for subset, rows in (
    (("a",), [said, nothing, nothing]),
    (("b",), [prior, prior, nothing]),
    (("a", "b"), [said, prior, nothing]),
  ):
    np.testing.assert_allclose(found[subset], rows, atol=1e-12)
  assert np.isfinite(prior).all()
