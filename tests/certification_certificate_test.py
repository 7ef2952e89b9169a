"""Certificates from arrays: exact cases, both sides of every claim, edges."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from robust_mm import certification
from robust_mm._types import Geometry

NAMES = ("audio", "image", "text")
NO_SLACK = certification.NO_SLACK


def _head(seed, classes=6, sizes=(5, 7, 4)):
  rng = np.random.default_rng(seed)
  rows = {m: rng.normal(size=(classes, d)) for m, d in zip(NAMES, sizes)}
  return rows, rng.normal(size=classes) * 0.1


def _geometry(rows, bias, lipschitz=1.0, factors=None):
  def f32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)

  return Geometry(
    head=f32(rows),
    bias=f32(bias),
    lipschitz=dict.fromkeys(rows, lipschitz),
    factors=None if factors is None else f32(factors),
  )


def _tables(geometry, form="general"):
  return certification.SensitivityTables(
    tables=certification.pairwise_sensitivity(geometry, form),
    source="global",
    sound=True,
  )


def _identity(seed, batch=200, present=None, dtype=np.float32, **kwargs):
  """Identity encoders: inputs, head, bias and the certificate."""
  rows, bias = _head(seed)
  rng = np.random.default_rng(seed + 1)
  inputs = {m: rng.normal(size=(batch, w.shape[1])) for m, w in rows.items()}
  contributions = {m: jnp.asarray(inputs[m] @ rows[m].T, dtype) for m in rows}
  kwargs = {"slack": NO_SLACK, "bias": jnp.asarray(bias, dtype), **kwargs}

  @jax.jit
  def build(contributions, tables):
    return certification.margin_certificate(
      contributions, tables, present, **kwargs
    )

  found = build(contributions, _tables(_geometry(rows, bias)))
  return inputs, rows, bias, found


_cached_identity = functools.lru_cache(_identity)
_covers = jax.jit(lambda c, budgets, q: c.covers(budgets, q), static_argnums=2)


def _logits(inputs, rows, bias):
  return sum(inputs[m] @ rows[m].T for m in rows) + bias


def _towards(inputs, rows, certificate, size, *, names=NAMES, rival=None):
  """Moves every example straight at a rival, by ``size`` in the joint norm."""
  y = np.asarray(certificate.prediction)
  j = np.asarray(certificate.nearest_class if rival is None else rival)
  direction = {m: rows[m][j] - rows[m][y] for m in names}
  length = np.sqrt(sum((d**2).sum(-1) for d in direction.values()))
  moved = dict(inputs)
  for m in names:
    moved[m] = inputs[m] + direction[m] * (size / length)[:, None]
  return moved


def test_radius_is_the_distance_to_the_decision_boundary():
  inputs, rows, bias, found = _identity(0, batch=1000)
  radius = np.asarray(found.radius, np.float64)
  y = np.asarray(found.prediction)
  for factor, flips in ((1 + 1e-4, 1000), (1 - 1e-4, 0)):
    moved = _towards(inputs, rows, found, radius * factor)
    changed = np.argmax(_logits(moved, rows, bias), -1) != y
    assert changed.sum() == flips
  logits = _logits(inputs, rows, bias)
  joined = np.concatenate([rows[m] for m in NAMES], axis=1)
  distance = np.full((1000, 6), np.inf)
  for row in range(1000):
    for j in set(range(6)) - {y[row]}:
      gap = np.linalg.norm(joined[y[row]] - joined[j])
      distance[row, j] = (logits[row, y[row]] - logits[row, j]) / gap
  np.testing.assert_allclose(radius, distance.min(-1), rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(found.nearest_class, distance.argmin(-1))


@pytest.mark.parametrize("name", NAMES)
def test_modality_radius_is_exact_for_identity_encoders(name):
  inputs, rows, bias, found = _identity(1)
  radius = np.asarray(found.modality_radius[name], np.float64)
  y = np.asarray(found.prediction)
  logits = _logits(inputs, rows, bias)
  gaps = np.linalg.norm(rows[name][y][:, None] - rows[name][None], axis=-1)
  np.put_along_axis(gaps, y[:, None], 1.0, -1)
  ratio = (np.max(logits, -1, keepdims=True) - logits) / gaps
  np.put_along_axis(ratio, y[:, None], np.inf, -1)
  for factor, flips in ((1 + 1e-4, True), (1 - 1e-4, False)):
    moved = _towards(
      inputs,
      rows,
      found,
      radius * factor,
      names=(name,),
      rival=ratio.argmin(-1),
    )
    changed = np.argmax(_logits(moved, rows, bias), -1) != y
    assert np.all(changed == flips)


def test_covered_budgets_hold_and_the_frontier_is_tight():
  inputs, rows, bias, found = _identity(2, batch=1000)
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
    changed = np.argmax(_logits(moved, rows, bias), -1) != y
    budgets = {m: jnp.asarray(s, jnp.float32) for m, s in sizes.items()}
    assert np.all(np.asarray(found.covers(budgets)) == covered)
    assert np.all(changed != covered)


def test_frontier_equals_the_largest_covered_budget():
  _, _, _, found = _cached_identity(3)
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
  _, _, _, found = _cached_identity(seed % 5)
  budgets = dict(zip(NAMES, sizes))
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


def test_joint_balls_are_ordered():
  _, _, _, found = _cached_identity(4)
  linf, l2, l1 = (found.joint_radius(b) for b in ("linf", "l2", "l1"))
  assert np.all(linf <= l2)
  assert np.all(l2 <= l1)
  np.testing.assert_array_equal(l2, found.radius)


@pytest.mark.parametrize("missing", [0, 1, 2, 3])
def test_removal_rule_equals_brute_force_over_subsets(missing):
  inputs, rows, bias, found = _identity(5)
  y = np.asarray(found.prediction)
  budgets = {"audio": 0.05, "image": 0.1, "text": 0.02}
  worst = np.full(200, np.inf)
  terms = {m: inputs[m] @ rows[m].T for m in NAMES}
  for count in range(missing + 1):
    for removed in itertools.combinations(NAMES, count):
      total = np.tile(bias, (200, 1))
      cost = np.zeros((200, 6))
      for m in set(NAMES) - set(removed):
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
  inputs, rows, bias, found = _identity(6)
  y = np.asarray(found.prediction)
  kept = {m: rows[m] for m in ("audio", "text")}
  logits = _logits(inputs, kept, bias)
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
  rows, bias = _head(7)
  rng = np.random.default_rng(7)
  terms = {
    m: jnp.asarray(rng.normal(size=(200, 6)), jnp.float32) for m in NAMES
  }
  geometry = _geometry(rows, bias)
  present = {m: jnp.full(200, m != "image") for m in NAMES}
  poisoned = {**terms, "image": jnp.full((200, 6), jnp.nan)}
  found = certification.margin_certificate(
    poisoned, _tables(geometry), present, bias=geometry.bias
  )
  rest = {m: rows[m] for m in ("audio", "text")}
  reduced = certification.margin_certificate(
    {m: terms[m] for m in rest},
    _tables(_geometry(rest, bias)),
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


def _orthonormal(seed, classes=6, size=12):
  rng = np.random.default_rng(seed)
  u, _, vt = np.linalg.svd(rng.normal(size=(classes, size)), False)
  return u @ vt


def test_three_forms_agree_on_an_orthonormal_head():
  factors = {
    m: np.random.default_rng(i).uniform(-2, 2, 6) for i, m in enumerate(NAMES)
  }
  rows = {m: factors[m][:, None] * _orthonormal(i) for i, m in enumerate(NAMES)}
  geometry = _geometry(rows, np.zeros(6), 0.7, factors)
  general = certification.pairwise_sensitivity(geometry)
  closed = certification.pairwise_sensitivity(geometry, "orthonormal")
  none = dict.fromkeys(NAMES, 0.0)
  defect = certification.pairwise_sensitivity(
    geometry, "orthonormal", defect=none
  )
  split = certification.pairwise_sensitivity(geometry, "split")
  for m in NAMES:
    np.testing.assert_allclose(general[m], closed[m], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(defect[m], closed[m], rtol=1e-6)
    assert np.all(split[m] >= closed[m] * (1 - 1e-6))
    assert np.all(split[m] <= closed[m] * np.sqrt(2) * (1 + 1e-6))
    assert np.all(np.diag(closed[m]) == 0)


@pytest.mark.parametrize("seed", range(5))
def test_closed_form_is_never_below_the_general_one_for_contractions(seed):
  rng = np.random.default_rng(seed)
  weight = rng.normal(size=(6, 9))
  weight /= np.linalg.norm(weight, 2)
  factors = {"audio": rng.uniform(0.1, 2, 6)}
  rows = {"audio": factors["audio"][:, None] * weight}
  geometry = _geometry(rows, np.zeros(6), factors=factors)
  general = certification.pairwise_sensitivity(geometry)["audio"]
  closed = certification.pairwise_sensitivity(geometry, "orthonormal")["audio"]
  assert np.all(closed >= general * (1 - 1e-6))
  # With rows of norm above 1 the same form is no bound: the test can fail.
  rows = {"audio": rows["audio"] * 5}
  general = certification.pairwise_sensitivity(
    _geometry(rows, np.zeros(6), factors=factors)
  )["audio"]
  assert np.any(closed < general)


def test_defect_form_bounds_rows_that_are_nearly_orthonormal():
  rng = np.random.default_rng(3)
  weight = _orthonormal(3) + 0.03 * rng.normal(size=(6, 12))
  defect = np.abs(weight @ weight.T - np.eye(6)).max()
  factors = {"audio": rng.uniform(0.1, 2, 6)}
  rows = {"audio": factors["audio"][:, None] * weight}
  geometry = _geometry(rows, np.zeros(6), factors=factors)
  general = certification.pairwise_sensitivity(geometry)["audio"]
  bound = certification.pairwise_sensitivity(
    geometry, "orthonormal", defect={"audio": defect}
  )["audio"]
  assert np.all(bound >= general * (1 - 1e-6))


def test_near_equal_rows_keep_their_distance():
  row = np.random.default_rng(0).normal(size=64).astype(np.float32)
  other = row.copy()
  other[0] += 2.4e-3
  rows = {"audio": np.stack([row, other])}
  table = certification.pairwise_sensitivity(_geometry(rows, np.zeros(2)))
  exact = np.linalg.norm(row.astype(float) - other.astype(float))
  np.testing.assert_allclose(table["audio"][0, 1], exact, rtol=1e-5)


def test_batch_sensitivities_are_the_rows_of_the_tables():
  factors = {
    m: np.random.default_rng(i).uniform(0.1, 2, 6) for i, m in enumerate(NAMES)
  }
  rows = {m: factors[m][:, None] * _orthonormal(i) for i, m in enumerate(NAMES)}
  label = np.array([0, 3, 5, 2])
  present = {m: jnp.asarray([True, True, False, True]) for m in NAMES}
  units = {"image": 3.0}
  closed = _geometry(rows, np.zeros(6), 0.7, factors)
  for geometry, form in (
    (closed, "orthonormal"),
    (_geometry(rows, np.zeros(6), 0.7), "general"),
  ):
    tables = certification.pairwise_sensitivity(geometry, form)
    found = certification.sensitivity(geometry, label, present, units)
    for m in NAMES:
      expected = np.asarray(tables[m])[label] * units.get(m, 1.0)
      expected[2] = 0
      np.testing.assert_allclose(found[m], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("with_factors", [True, False])
def test_batch_sensitivities_have_finite_gradients(with_factors):
  factors = {"audio": np.array([0.0, 0.0, 1.0])}
  rows = {"audio": np.zeros((3, 4))}
  geometry = _geometry(
    rows, np.zeros(3), 1.0, factors if with_factors else None
  )
  present = {"audio": jnp.asarray([True, False])}

  def total(geometry):
    found = certification.sensitivity(geometry, np.array([0, 1]), present)
    return jnp.sum(found["audio"])

  grads = jax.grad(total)(geometry)
  assert all(jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(grads))


def test_scaling_the_head_leaves_radii_and_units_divide_them():
  rows, bias = _head(8)
  _, _, _, found = _identity(8)
  rng = np.random.default_rng(9)
  inputs = {m: rng.normal(size=(200, w.shape[1])) for m, w in rows.items()}
  terms = {m: jnp.asarray(inputs[m] @ rows[m].T, jnp.float32) for m in NAMES}
  found = certification.margin_certificate(
    terms, _tables(_geometry(rows, bias)), bias=bias, slack=NO_SLACK
  )
  tenfold = certification.margin_certificate(
    {m: 10 * t for m, t in terms.items()},
    _tables(_geometry({m: 10 * w for m, w in rows.items()}, bias)),
    bias=10 * bias,
    slack=NO_SLACK,
  )
  np.testing.assert_allclose(tenfold.radius, found.radius, rtol=1e-4, atol=1e-6)
  units = {"audio": 4.0, "image": 0.5, "text": 1.0}
  scaled = certification.margin_certificate(
    terms,
    _tables(_geometry(rows, bias)),
    bias=bias,
    slack=NO_SLACK,
    units=units,
  )
  for m in NAMES:
    np.testing.assert_allclose(
      scaled.modality_radius[m] * units[m], found.modality_radius[m], rtol=1e-5
    )
    assert scaled.units[m] == units[m]


def test_permuting_classes_and_modalities_permutes_the_outputs():
  rows, bias = _head(10)
  rng = np.random.default_rng(10)
  terms = {
    m: jnp.asarray(rng.normal(size=(200, 6)), jnp.float32) for m in NAMES
  }
  order = np.array([3, 1, 5, 0, 2, 4])
  found = certification.margin_certificate(
    terms, _tables(_geometry(rows, bias)), bias=bias
  )
  permuted = certification.margin_certificate(
    {m: terms[m][:, order] for m in reversed(NAMES)},
    _tables(
      _geometry({m: rows[m][order] for m in reversed(NAMES)}, bias[order])
    ),
    bias=bias[order],
  )
  np.testing.assert_allclose(permuted.radius, found.radius, rtol=1e-6)
  np.testing.assert_array_equal(order[permuted.prediction], found.prediction)
  np.testing.assert_array_equal(
    order[permuted.nearest_class], found.nearest_class
  )


@pytest.mark.parametrize("norm, exponent", [("linf", 0.5), ("l1", 0.0)])
def test_other_input_norms_use_the_dimension(norm, exponent):
  sizes = {"audio": 5, "image": 7, "text": 4}
  _, _, _, found = _identity(11)
  _, _, _, other = _identity(11, norm=norm, sizes=sizes)
  for m in NAMES:
    np.testing.assert_allclose(
      other.modality_radius[m] * sizes[m] ** exponent,
      found.modality_radius[m],
      rtol=1e-5,
    )


def test_runner_up_is_often_not_the_nearest_class():
  _, _, _, found = _identity(12, batch=2000)
  _, _, _, published = _identity(12, batch=2000, fidelity="published")
  differs = np.asarray(found.nearest_class != found.runner_up)
  assert 0.03 < differs.mean() < 0.4
  overstated = np.asarray(published.radius) > np.asarray(found.radius) * 1.001
  np.testing.assert_array_equal(overstated & ~differs, False)
  assert overstated.sum() > 0
  assert found.sound
  assert found.kind == "certified"
  assert not published.sound
  assert published.kind == "estimated"
  assert "estimated" in repr(published)


@pytest.mark.parametrize("ball", ["l2", "linf", "l1"])
def test_nearest_class_of_a_ball_sets_its_radius(ball):
  *_, found = _cached_identity(3)
  y, j = (
    np.asarray(found.prediction),
    np.asarray(found.joint_nearest_class(ball)),
  )
  assert np.all(j != y)
  rows = np.arange(len(y))
  sizes = [np.asarray(found.sensitivity[m])[rows, j] for m in NAMES]
  order = {"l2": 2, "linf": 1, "l1": np.inf}[ball]
  expected = np.asarray(found.margins)[rows, j] / np.linalg.norm(
    sizes, order, axis=0
  )
  np.testing.assert_allclose(found.joint_radius(ball), expected, rtol=1e-5)
  same = j == np.asarray(found.nearest_class)
  assert same.all() == (ball == "l2"), "the balls never differ"
  shares = found.sensitivity_shares(jnp.asarray(j))
  total = sum(np.square(sizes))
  for name, size in zip(NAMES, sizes):
    np.testing.assert_allclose(shares[name], size**2 / total, rtol=1e-5)


def test_vulnerability_shares_sum_to_one():
  _, _, _, found = _cached_identity(13)
  total = sum(found.vulnerability.values())
  np.testing.assert_allclose(total, 1, rtol=1e-5)
  eta = found.vulnerability_ratio("audio", "image")
  one = np.asarray(found.sensitivity["audio"], float)
  two = np.asarray(found.sensitivity["image"], float)
  rival = two > 0
  np.testing.assert_allclose(
    np.asarray(eta)[rival], one[rival] / two[rival], rtol=1e-5
  )


def _plain(terms, tables, **kwargs):
  tables = certification.SensitivityTables(
    tables={m: jnp.asarray(t, jnp.float32) for m, t in tables.items()},
    source="global",
    sound=True,
  )
  terms = {m: jnp.asarray(t, jnp.float32) for m, t in terms.items()}
  return certification.margin_certificate(terms, tables, **kwargs)


HOLLOW = 1.0 - np.eye(3)


def test_ties_have_radius_zero_and_cover_nothing():
  found = _plain({"a": [[1.0, 1.0, 0.0]]}, {"a": HOLLOW})
  assert found.radius[0] == 0
  assert found.modality_radius["a"][0] == 0
  assert not found.covers({})[0]


def test_nothing_to_attack_is_infinite():
  found = _plain({"a": [[2.0, 1.0, 0.0]]}, {"a": 0 * HOLLOW})
  assert found.radius[0] == np.inf
  assert found.covers({"a": np.inf})[0]
  assert found.vulnerability["a"][0] == 0


def test_nothing_present_is_infinite_and_invalid():
  for bias in ([0.0, 0.0, 0.0], [0.0, 2.0, 1.0]):
    found = _plain(
      {"a": [[2.0, 1.0, 0.0]]},
      {"a": HOLLOW},
      present={"a": np.array([False])},
      bias=np.asarray(bias),
    )
    assert found.prediction[0] == np.argmax(bias)
    assert found.radius[0] == np.inf
    assert not found.valid[0]
    assert found.covers({"a": 1.0}, max_missing=1)[0]
    assert found.nearest_class[0] != found.prediction[0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["logits", "tables"])
def test_non_finite_values_are_never_certified(bad, where):
  terms, table = np.array([[2.0, 1.0, 0.0]]), HOLLOW.copy()
  if where == "logits":
    terms[0, 1] = bad
  else:
    table[0, 1] = bad
  found = _plain(
    {"a": terms, "b": [[1.0, 0.0, 0.0]]}, {"a": table, "b": HOLLOW}
  )
  assert found.radius[0] == 0
  assert found.modality_radius["b"][0] == 0
  assert not found.covers({})[0]
  assert found.radius_without(["a"])[0] == 0
  assert found.valid[0]
  leaves = [x for x in jax.tree.leaves(found) if x.dtype.kind == "f"]
  assert not any(np.any(np.isnan(x)) for x in leaves)


@pytest.mark.parametrize("size", [1e30, 3e38, 1e-30])
def test_extreme_logits_give_no_nan(size):
  found = _plain(
    {"a": [[size, -size, 0.0]], "b": [[size, 0.0, -size]]},
    {"a": HOLLOW, "b": HOLLOW},
  )
  for leaf in jax.tree.leaves(found):
    assert not np.any(np.isnan(np.asarray(leaf, float)))
  for removed in (["a"], ["a", "b"]):
    assert not np.isnan(found.radius_without(removed)[0])
  assert not np.any(np.isnan(found.frontier("a", "b", jnp.array([0.0, 1.0]))))


def test_slack_only_shrinks():
  _, _, _, exact = _identity(14)
  _, _, _, safe = _identity(14, slack=certification.DEFAULT_SLACK)
  assert np.all(safe.radius <= exact.radius)
  np.testing.assert_allclose(safe.radius, exact.radius, rtol=1e-3, atol=1e-3)


def test_joint_fusion_is_an_ellipsoid():
  rng = np.random.default_rng(15)
  logits = jnp.asarray(rng.normal(size=(200, 6)), jnp.float32)
  rows, bias = _head(15)
  tables = _tables(_geometry(rows, bias))
  found = certification.margin_certificate(
    None, tables, logits=logits, fusion="joint", slack=NO_SLACK
  )
  additive = certification.margin_certificate(
    {m: logits / 3 for m in NAMES}, tables, logits=logits, slack=NO_SLACK
  )
  assert np.all(found.radius >= additive.radius)
  size = np.asarray(found.radius) * 0.999 / np.sqrt(3)
  assert np.all(found.covers(dict.fromkeys(NAMES, jnp.asarray(size))))
  assert not np.any(found.covers(dict.fromkeys(NAMES, jnp.asarray(size * 3))))
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


@pytest.mark.parametrize(
  "call, match",
  [
    (lambda c: c.covers({"nose": 1.0}), "budgets names the unknown"),
    (lambda c: c.covers({"a": -1.0}), "budgets"),
    (lambda c: c.covers({"a": float("nan")}), "budgets"),
    (lambda c: c.covers({}, max_missing=2), "max_missing"),
    (lambda c: c.covers({}, max_missing=-1), "max_missing"),
    (lambda c: c.radius_without(["nose"]), "removed names the unknown"),
    (lambda c: c.joint_radius("l3"), "ball"),
    (lambda c: c.frontier("a", "nose", jnp.zeros(2)), "frontier"),
  ],
)
def test_bad_questions_are_refused_by_name(call, match):
  found = _plain({"a": [[2.0, 1.0, 0.0]]}, {"a": HOLLOW})
  with pytest.raises(ValueError, match=match):
    call(found)


@pytest.mark.parametrize(
  "kwargs, match",
  [
    ({"units": {"a": 0.0}}, "units"),
    ({"units": {"nose": 1.0}}, "units"),
    ({"norm": "l7"}, "norm"),
    ({"norm": "linf"}, "sizes"),
    ({"fidelity": "rough"}, "fidelity"),
    ({"fusion": "late"}, "fusion"),
    ({"slack": certification.Slack(margin=-1.0)}, "slack"),
    ({"logits": jnp.zeros((1, 3), jnp.bfloat16)}, "bfloat16"),
  ],
)
def test_bad_settings_are_refused_by_name(kwargs, match):
  with pytest.raises(ValueError, match=match):
    _plain({"a": [[2.0, 1.0, 0.0]]}, {"a": HOLLOW}, **kwargs)


def test_relative_units_by_name_point_to_the_helper():
  with pytest.raises(ValueError, match="relative_units"):
    _plain({"a": [[2.0, 1.0, 0.0]]}, {"a": HOLLOW}, units="relative")
