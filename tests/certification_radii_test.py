"""Radii and shares of a certificate: exact cases, both sides of a claim."""

import certification_heads as heads
import jax.numpy as jnp
import numpy as np
import pytest

from robust_mm import certification


def test_radius_is_the_distance_to_the_decision_boundary():
  inputs, rows, bias, found = heads.identity(0, batch=1000)
  radius = np.asarray(found.radius, np.float64)
  y = np.asarray(found.prediction)
  for factor, flips in ((1 + 1e-4, 1000), (1 - 1e-4, 0)):
    moved = heads.towards(inputs, rows, found, radius * factor)
    changed = np.argmax(heads.logits(moved, rows, bias), -1) != y
    assert changed.sum() == flips
  logits = heads.logits(inputs, rows, bias)
  joined = np.concatenate([rows[m] for m in heads.NAMES], axis=1)
  distance = np.full((1000, 6), np.inf)
  for row in range(1000):
    for j in set(range(6)) - {y[row]}:
      gap = np.linalg.norm(joined[y[row]] - joined[j])
      distance[row, j] = (logits[row, y[row]] - logits[row, j]) / gap
  np.testing.assert_allclose(radius, distance.min(-1), rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(found.nearest_class, distance.argmin(-1))


@pytest.mark.parametrize("name", heads.NAMES)
def test_modality_radius_is_exact_for_identity_encoders(name):
  inputs, rows, bias, found = heads.identity(1)
  radius = np.asarray(found.modality_radius[name], np.float64)
  y = np.asarray(found.prediction)
  logits = heads.logits(inputs, rows, bias)
  gaps = np.linalg.norm(rows[name][y][:, None] - rows[name][None], axis=-1)
  np.put_along_axis(gaps, y[:, None], 1.0, -1)
  ratio = (np.max(logits, -1, keepdims=True) - logits) / gaps
  np.put_along_axis(ratio, y[:, None], np.inf, -1)
  for factor, flips in ((1 + 1e-4, True), (1 - 1e-4, False)):
    moved = heads.towards(
      inputs,
      rows,
      found,
      radius * factor,
      names=(name,),
      rival=ratio.argmin(-1),
    )
    changed = np.argmax(heads.logits(moved, rows, bias), -1) != y
    assert np.all(changed == flips)


def test_joint_balls_are_ordered():
  _, _, _, found = heads.cached_identity(4)
  linf, l2, l1 = (found.joint_radius(b) for b in ("linf", "l2", "l1"))
  assert np.all(linf <= l2)
  assert np.all(l2 <= l1)
  np.testing.assert_array_equal(l2, found.radius)


def test_scaling_the_head_leaves_radii_and_units_divide_them():
  rows, bias = heads.head(8)
  _, _, _, found = heads.identity(8)
  rng = np.random.default_rng(9)
  inputs = {m: rng.normal(size=(200, w.shape[1])) for m, w in rows.items()}
  terms = {
    m: jnp.asarray(inputs[m] @ rows[m].T, jnp.float32) for m in heads.NAMES
  }
  found = certification.margin_certificate(
    terms,
    heads.tables(heads.geometry(rows, bias)),
    bias=bias,
    slack=heads.NO_SLACK,
  )
  tenfold = certification.margin_certificate(
    {m: 10 * t for m, t in terms.items()},
    heads.tables(heads.geometry({m: 10 * w for m, w in rows.items()}, bias)),
    bias=10 * bias,
    slack=heads.NO_SLACK,
  )
  np.testing.assert_allclose(tenfold.radius, found.radius, rtol=1e-5, atol=1e-6)
  units = {"audio": 4.0, "image": 0.5, "text": 1.0}
  scaled = certification.margin_certificate(
    terms,
    heads.tables(heads.geometry(rows, bias)),
    bias=bias,
    slack=heads.NO_SLACK,
    units=units,
  )
  for m in heads.NAMES:
    np.testing.assert_allclose(
      scaled.modality_radius[m] * units[m], found.modality_radius[m], rtol=1e-5
    )
    assert scaled.units[m] == units[m]


def test_permuting_classes_and_modalities_permutes_the_outputs():
  rows, bias = heads.head(10)
  rng = np.random.default_rng(10)
  terms = {
    m: jnp.asarray(rng.normal(size=(200, 6)), jnp.float32) for m in heads.NAMES
  }
  order = np.array([3, 1, 5, 0, 2, 4])
  found = certification.margin_certificate(
    terms, heads.tables(heads.geometry(rows, bias)), bias=bias
  )
  permuted = certification.margin_certificate(
    {m: terms[m][:, order] for m in reversed(heads.NAMES)},
    heads.tables(
      heads.geometry(
        {m: rows[m][order] for m in reversed(heads.NAMES)}, bias[order]
      )
    ),
    bias=bias[order],
  )
  np.testing.assert_allclose(permuted.radius, found.radius, rtol=1e-6)
  np.testing.assert_array_equal(order[permuted.prediction], found.prediction)
  for m in heads.NAMES:
    for value, expected in (
      (permuted.modality_radius[m], found.modality_radius[m]),
      (permuted.vulnerability[m], found.vulnerability[m]),
      (permuted.sensitivity[m], found.sensitivity[m][:, order]),
    ):
      np.testing.assert_allclose(value, expected, rtol=1e-6)
  np.testing.assert_array_equal(
    order[permuted.nearest_class], found.nearest_class
  )


@pytest.mark.parametrize("norm, exponent", [("linf", 0.5), ("l1", 0.0)])
def test_other_input_norms_use_the_dimension(norm, exponent):
  sizes = {"audio": 5, "image": 7, "text": 4}
  _, _, _, found = heads.identity(11)
  _, _, _, other = heads.identity(11, norm=norm, sizes=sizes)
  for m in heads.NAMES:
    np.testing.assert_allclose(
      other.modality_radius[m] * sizes[m] ** exponent,
      found.modality_radius[m],
      rtol=1e-5,
    )


def test_runner_up_is_often_not_the_nearest_class():
  _, _, _, found = heads.identity(12, batch=2000)
  _, _, _, published = heads.identity(12, batch=2000, fidelity="published")
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
  *_, found = heads.cached_identity(3)
  y = np.asarray(found.prediction)
  j = np.asarray(found.joint_nearest_class(ball))
  assert np.all(j != y)
  rows = np.arange(len(y))
  sizes = [np.asarray(found.sensitivity[m])[rows, j] for m in heads.NAMES]
  order = {"l2": 2, "linf": 1, "l1": np.inf}[ball]
  expected = np.asarray(found.margins)[rows, j] / np.linalg.norm(
    sizes, order, axis=0
  )
  np.testing.assert_allclose(found.joint_radius(ball), expected, rtol=1e-5)
  same = j == np.asarray(found.nearest_class)
  assert same.all() == (ball == "l2"), "the balls never differ"
  shares = found.sensitivity_shares(jnp.asarray(j))
  total = sum(np.square(sizes))
  for name, size in zip(heads.NAMES, sizes):
    np.testing.assert_allclose(shares[name], size**2 / total, rtol=1e-5)


def test_vulnerability_shares_sum_to_one():
  _, _, _, found = heads.cached_identity(13)
  total = sum(found.vulnerability.values())
  np.testing.assert_allclose(total, 1, rtol=1e-5)
  eta = found.vulnerability_ratio("audio", "image")
  one = np.asarray(found.sensitivity["audio"], float)
  two = np.asarray(found.sensitivity["image"], float)
  rival = two > 0
  np.testing.assert_allclose(
    np.asarray(eta)[rival], one[rival] / two[rival], rtol=1e-5
  )


def test_slack_only_shrinks():
  _, _, _, exact = heads.identity(14)
  _, _, _, safe = heads.identity(14, slack=certification.DEFAULT_SLACK)
  assert np.all(safe.radius <= exact.radius)
  np.testing.assert_allclose(safe.radius, exact.radius, rtol=1e-3, atol=1e-3)
