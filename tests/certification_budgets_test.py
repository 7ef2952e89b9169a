"""Budgets, the frontier, missing modalities: exact cases, both sides."""

import itertools

import certification_heads as heads
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from robust_mm import certification

_covers = jax.jit(lambda c, budgets, q: c.covers(budgets, q), static_argnums=2)


def test_covered_budgets_hold_and_the_frontier_is_tight():
  inputs, rows, bias, found = heads.identity(2, batch=1000)
  y = np.asarray(found.prediction)
  rng = np.random.default_rng(0)
  first = rng.uniform(0, 1, 1000) * np.asarray(found.modality_radius["audio"])
  margins = np.asarray(found.margins, np.float64)
  one = np.asarray(found.sensitivity["audio"], np.float64)
  two = np.asarray(found.sensitivity["image"], np.float64)
  with np.errstate(divide="ignore", invalid="ignore"):
    bound = (margins - one * first[:, None]) / two
  bound[np.arange(1000), y] = np.inf
  second, rival = bound.min(-1), bound.argmin(-1)
  for factor, covered in ((1 - 1e-3, True), (1 + 1e-3, False)):
    sizes = {"audio": first * factor, "image": second * factor}
    moved = dict(inputs)
    for m, size in sizes.items():
      step = rows[m][rival] - rows[m][y]
      step /= np.linalg.norm(step, axis=-1, keepdims=True)
      moved[m] = inputs[m] + step * size[:, None]
    changed = np.argmax(heads.logits(moved, rows, bias), -1) != y
    budgets = {m: jnp.asarray(s, jnp.float32) for m, s in sizes.items()}
    assert np.all(np.asarray(found.covers(budgets)) == covered)
    assert np.all(changed != covered)


def test_frontier_equals_the_largest_covered_budget():
  _, _, _, found = heads.cached_identity(3)
  grid = jnp.linspace(0, 0.5, 7)
  frontier = found.frontier("audio", "image", grid)
  assert frontier.shape == (200, 7)
  for index, size in enumerate(grid):
    edge = frontier[:, index]
    inside = found.covers({"audio": float(size), "image": edge * 0.999})
    outside = found.covers({"audio": float(size), "image": edge * 1.001 + 1e-6})
    np.testing.assert_array_equal(inside, np.asarray(edge) > 0)
    assert not np.any(outside)
  second_difference = np.diff(np.asarray(frontier, np.float64), 2, axis=-1)
  clipped = np.asarray(frontier)[:, 2:] == 0
  assert np.all(second_difference[~clipped] <= 1e-5)


@settings(max_examples=40, deadline=None)
@given(
  st.integers(0, 50),
  st.lists(st.floats(0, 2), min_size=3, max_size=3),
  st.lists(st.floats(0, 1), min_size=3, max_size=3),
)
def test_covered_budgets_are_down_closed_and_contain_the_ball(
  seed, sizes, shrink
):
  _, _, _, found = heads.cached_identity(seed % 5)
  budgets = dict(zip(heads.NAMES, sizes))
  smaller = {m: s * f for (m, s), f in zip(budgets.items(), shrink)}
  covered = np.asarray(_covers(found, budgets, 0))
  assert np.all(np.asarray(_covers(found, smaller, 0)) | ~covered)
  for missing in (1, 2):
    assert np.all(covered | ~np.asarray(_covers(found, budgets, missing)))
  length = np.linalg.norm(sizes)
  inside = np.asarray(found.radius) > length * (1 + 1e-5)
  assert np.all(covered[inside])
  largest = np.asarray(found.joint_radius("linf")) > max(sizes) * (1 + 1e-5)
  total = np.asarray(found.joint_radius("l1")) > sum(sizes) * (1 + 1e-5)
  assert np.all(covered[largest])
  assert np.all(covered[total])


@pytest.mark.parametrize("missing", [0, 1, 2, 3])
def test_removal_rule_equals_brute_force_over_subsets(missing):
  inputs, rows, bias, found = heads.identity(5)
  y = np.asarray(found.prediction)
  budgets = {"audio": 0.05, "image": 0.1, "text": 0.02}
  worst = np.full(200, np.inf)
  terms = {m: inputs[m] @ rows[m].T for m in heads.NAMES}
  for count in range(missing + 1):
    for removed in itertools.combinations(heads.NAMES, count):
      total = np.tile(bias, (200, 1))
      cost = np.zeros((200, 6))
      for m in set(heads.NAMES) - set(removed):
        total = total + terms[m]
        gap = rows[m][y][:, None] - rows[m][None]
        cost += budgets[m] * np.linalg.norm(gap, axis=-1)
      margin = total[np.arange(200), y][:, None] - total - cost
      margin[np.arange(200), y] = np.inf
      worst = np.minimum(worst, margin.min(-1))
  clear = np.abs(worst) > 1e-5
  covered = np.asarray(found.covers(budgets, max_missing=missing))
  np.testing.assert_array_equal(covered[clear], worst[clear] > 0)
  assert 0 < covered.sum() < 200 or missing >= 2


def test_radius_without_equals_the_reduced_model():
  inputs, rows, bias, found = heads.identity(6)
  y = np.asarray(found.prediction)
  kept = {m: rows[m] for m in ("audio", "text")}
  logits = heads.logits(inputs, kept, bias)
  joined = np.concatenate(list(kept.values()), axis=1)
  gap = np.linalg.norm(joined[y][:, None] - joined[None], axis=-1)
  np.put_along_axis(gap, y[:, None], 1.0, -1)
  ratio = (np.take_along_axis(logits, y[:, None], -1) - logits) / gap
  np.put_along_axis(ratio, y[:, None], np.inf, -1)
  expected = np.maximum(ratio.min(-1), 0)
  np.testing.assert_allclose(
    found.radius_without(["image"]), expected, rtol=1e-4, atol=1e-5
  )
  np.testing.assert_array_equal(found.radius_without([]), found.radius)


def test_absent_modality_equals_the_model_without_it_bitwise():
  rows, bias = heads.head(7)
  rng = np.random.default_rng(7)
  terms = {
    m: jnp.asarray(rng.normal(size=(200, 6)), jnp.float32) for m in heads.NAMES
  }
  geometry = heads.geometry(rows, bias)
  present = {m: jnp.full(200, m != "image") for m in heads.NAMES}
  poisoned = {**terms, "image": jnp.full((200, 6), jnp.nan)}
  found = certification.margin_certificate(
    poisoned, heads.tables(geometry), present, bias=geometry.bias
  )
  rest = {m: rows[m] for m in ("audio", "text")}
  reduced = certification.margin_certificate(
    {m: terms[m] for m in rest},
    heads.tables(heads.geometry(rest, bias)),
    bias=geometry.bias,
  )
  np.testing.assert_array_equal(found.radius, reduced.radius)
  np.testing.assert_array_equal(found.margins, reduced.margins)
  for m in rest:
    np.testing.assert_array_equal(
      found.modality_radius[m], reduced.modality_radius[m]
    )
  assert np.all(found.vulnerability["image"] == 0)
  budgets = {"image": np.inf, "audio": 0.1}
  np.testing.assert_array_equal(
    found.covers(budgets), reduced.covers({"audio": 0.1})
  )


def test_joint_fusion_is_an_ellipsoid():
  rng = np.random.default_rng(15)
  logits = jnp.asarray(rng.normal(size=(200, 6)), jnp.float32)
  rows, bias = heads.head(15)
  tables = heads.tables(heads.geometry(rows, bias))
  found = certification.margin_certificate(
    None, tables, logits=logits, fusion="joint", slack=heads.NO_SLACK
  )
  additive = certification.margin_certificate(
    {m: logits / 3 for m in heads.NAMES},
    tables,
    logits=logits,
    slack=heads.NO_SLACK,
  )
  assert np.all(found.radius >= additive.radius)
  size = np.asarray(found.radius) * 0.999 / np.sqrt(3)
  assert np.all(found.covers(dict.fromkeys(heads.NAMES, jnp.asarray(size))))
  assert not np.any(
    found.covers(dict.fromkeys(heads.NAMES, jnp.asarray(size * 3)))
  )
  # The ellipsoid covers what the polytope covers for the same constants.
  budgets = {"audio": 0.05, "image": 0.03}
  assert np.all(
    np.asarray(found.covers(budgets)) | ~np.asarray(additive.covers(budgets))
  )
  edge = found.frontier("audio", "image", jnp.array([0.0, 0.05]))
  inside = found.covers({"audio": 0.05, "image": edge[:, 1] * 0.999})
  np.testing.assert_array_equal(inside, np.asarray(edge[:, 1]) > 0)
  with pytest.raises(ValueError, match="max_missing"):
    found.covers({}, max_missing=1)
