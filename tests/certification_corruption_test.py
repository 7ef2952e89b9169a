"""A modality replaced by anything: bounded embeddings, capped costs."""

import dataclasses
import itertools

import certification_heads as heads
import certification_models as hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

import robust_mm as rmm
from robust_mm import certification
from robust_mm import margins
from robust_mm.models import encoders
from robust_mm.models import functional

RADII = {"audio": 2.0, "image": 0.2, "text": 0.4}


def _bounded(seed, batch=500, radii=None, scale=1.0, true=RADII):
  """Identity encoders projected on balls: embeddings, head, certificate.

  ``scale`` falsifies the radii that the certificate believes in.
  """
  radii = true if radii is None else radii
  rows, bias = heads.head(seed)
  rng = np.random.default_rng(seed + 1)
  embeddings = {}
  for m, w in rows.items():
    z = rng.normal(size=(batch, w.shape[1]))
    z *= (
      true[m]
      * rng.random((batch, 1))
      / np.linalg.norm(z, axis=-1, keepdims=True)
    )
    embeddings[m] = z
  stated = heads.geometry(
    rows, bias, embedding_radius={m: scale * r for m, r in radii.items()}
  )
  terms = {m: jnp.asarray(embeddings[m] @ rows[m].T, jnp.float32) for m in rows}
  found = certification.margin_certificate(
    terms,
    certification.tables.global_tables(stated),
    bias=stated.bias,
    slack=heads.NO_SLACK,
  )
  return embeddings, rows, bias, found


def _worst_margins(embeddings, rows, bias, found, names, true=RADII):
  """Margins ``[b, k]`` with the worst embeddings of ``names`` per rival."""
  y = np.asarray(found.prediction)
  margin = bias[y][:, None] - bias
  for m, w in rows.items():
    gap = w[y][:, None] - w[None]
    if m in names:
      length = np.linalg.norm(gap, axis=-1)
      unit = gap / np.maximum(length, 1e-300)[..., None]
      worst = -true[m] * unit
      margin = margin + np.einsum("bkd,bkd->bk", gap, worst)
    else:
      margin = margin + np.einsum("bkd,bd->bk", gap, embeddings[m])
  margin[np.arange(len(y)), y] = np.inf
  return margin


@pytest.mark.parametrize("names", [("image",), ("text",), ("image", "text")])
def test_replaced_modalities_are_covered_exactly(names):
  embeddings, rows, bias, found = _bounded(0)
  worst = _worst_margins(embeddings, rows, bias, found, names).min(-1)
  clear = np.abs(worst) > 1e-5
  covered = np.asarray(found.covers(dict.fromkeys(names, np.inf)))
  np.testing.assert_array_equal(covered[clear], worst[clear] > 0)
  assert 0 < covered.sum() < 500
  # Certificates that believe in balls smaller by 1.2 are refuted.
  wrong = _bounded(0, scale=1 / 1.2)[-1]
  claimed = np.asarray(wrong.covers(dict.fromkeys(names, np.inf)))
  assert np.any(claimed & (worst < 0))


@pytest.mark.parametrize("name", ["image", "text"])
def test_modality_radius_is_infinite_exactly_where_anything_is_covered(name):
  found = _bounded(1)[-1]
  radius = np.asarray(found.modality_radius[name])
  anything = np.asarray(found.covers({name: np.inf}))
  np.testing.assert_array_equal(np.isinf(radius), anything)
  finite = ~anything
  assert 0 < anything.sum() < 500
  plain = _bounded(1, radii={})[-1]
  least = np.asarray(plain.modality_radius[name])
  assert np.all(radius >= least)
  # A rival out of reach of the cap leaves the minimum to another one.
  assert np.any(radius[finite] > least[finite])
  for factor, covered in ((1 - 1e-4, True), (1 + 1e-4, False)):
    size = np.where(finite, radius * factor, 0)
    held = np.asarray(found.covers({name: jnp.asarray(size, jnp.float32)}))
    assert np.all(held[finite] == covered)


def _cheapest(margin, slope, cap, ball):
  """The joint radius of one rival by trying every set of spent caps."""
  slope, cap = slope[slope > 0], cap[slope > 0]
  best = np.inf
  everyone = set(range(len(slope)))
  for size in range(len(slope) + 1):
    for spent in map(list, itertools.combinations(everyone, size)):
      others = sorted(everyone - set(spent))
      rest = margin - cap[spent].sum()
      used = cap[spent] / slope[spent]
      # How the others share the rest: in one, or by their slopes.
      shares = {
        "l2": [slope[others] ** 2],
        "linf": [slope[others]],
        "l1": [np.eye(len(others))[i] for i in range(len(others))],
      }[ball]
      for share in shares if others else []:
        cost = share / share.sum() * rest
        if rest < 0 or np.any(cost > cap[others]):
          continue
        sizes = np.concatenate([used, cost / slope[others]])
        order = {"l2": 2, "linf": np.inf, "l1": 1}[ball]
        best = min(best, np.linalg.norm(sizes, order))
  return best


@pytest.mark.parametrize("ball", margins.BALLS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_capped_joint_radius_is_the_cheapest_way_to_the_margin(ball, data):
  size = st.floats(0.05, 4.0)
  slope = np.array(data.draw(st.lists(size, min_size=3, max_size=3)))
  cap = np.array(
    data.draw(
      st.lists(st.one_of(size, st.just(np.inf)), min_size=3, max_size=3)
    )
  )
  if data.draw(st.booleans()):
    slope[0] = 0.0
  margin = data.draw(st.floats(0.05, 8.0))
  found = margins.capped_joint_ratios(
    jnp.asarray([margin], jnp.float32),
    {m: jnp.asarray([s], jnp.float32) for m, s in zip(heads.NAMES, slope)},
    {m: jnp.asarray([c], jnp.float32) for m, c in zip(heads.NAMES, cap)},
    ball=ball,
  )[0]
  finite = np.where(np.isinf(cap), 1e9, cap)
  expected = _cheapest(margin, slope, finite, ball)
  # At the very edge of what all caps can reach, either answer is rounding.
  total = cap[slope > 0].sum()
  if abs(total - margin) > 1e-4 * margin:
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("ball", margins.BALLS)
def test_capped_joint_radius_holds_and_is_tight(ball):
  found = _bounded(2)[-1]
  radius = np.asarray(found.joint_radius(ball), np.float64)
  plain = np.asarray(_bounded(2, radii={})[-1].joint_radius(ball))
  assert np.all(radius >= plain * (1 - 1e-6))
  larger = np.isfinite(radius) & (radius > plain * 1.01)
  assert larger.sum() > 10
  rng = np.random.default_rng(0)
  order = {"l2": 2, "linf": np.inf, "l1": 1}[ball]
  reached = np.zeros(500, bool)
  for _ in range(300):
    sizes = rng.random((500, 3)) ** rng.choice([0.3, 1, 4], (500, 3))
    length = np.linalg.norm(sizes, order, axis=-1)
    sizes *= (np.where(np.isfinite(radius), radius, 1e3) / length)[:, None]
    for factor in (1 - 1e-4, 1.05):
      budgets = {
        m: jnp.asarray(factor * sizes[:, i], jnp.float32)
        for i, m in enumerate(heads.NAMES)
      }
      held = np.asarray(found.covers(budgets))
      if factor < 1:
        assert np.all(held | (radius == 0))
      else:
        reached |= ~held
  assert reached[np.isfinite(radius)].mean() > 0.95
  assert not np.any(reached[np.isinf(radius)])


def test_a_large_ball_changes_nothing():
  plain = _bounded(3, radii={})[-1]
  assert plain.drops is None
  huge = _bounded(3, radii=dict.fromkeys(heads.NAMES, 1e6))[-1]
  np.testing.assert_array_equal(huge.nearest_class, plain.nearest_class)
  np.testing.assert_allclose(huge.radius, plain.radius, rtol=1e-6)


def test_frontier_with_caps_equals_the_largest_covered_budget():
  found = _bounded(4, radii={"audio": 2.0, "image": 0.2})[-1]
  grid = jnp.asarray([0.0, 0.1, 0.5, jnp.inf])
  frontier = np.asarray(found.frontier("audio", "image", grid))
  assert np.any(np.isinf(frontier))
  assert np.any(np.isfinite(frontier) & (frontier > 0))
  for index, size in enumerate(np.asarray(grid)):
    edge = frontier[:, index]
    inside = found.covers({"audio": size, "image": jnp.asarray(edge * 0.999)})
    outside = found.covers(
      {"audio": size, "image": jnp.asarray(edge * 1.001 + 1e-6)}
    )
    np.testing.assert_array_equal(inside, edge > 0)
    np.testing.assert_array_equal(outside, np.isinf(edge))


def test_replacing_one_and_removing_another_equals_brute_force():
  true = {"audio": 1.0, "image": 0.03, "text": 1.0}
  embeddings, rows, bias, found = _bounded(5, batch=2000, true=true)
  y = np.asarray(found.prediction)
  worst = np.full(2000, np.inf)
  for removed in ((), *((m,) for m in heads.NAMES)):
    kept = {m: w for m, w in rows.items() if m not in removed}
    left = _worst_margins(embeddings, kept, bias, found, ("image",), true)
    left[np.arange(2000), y] = np.inf
    worst = np.minimum(worst, left.min(-1))
  clear = np.abs(worst) > 1e-5
  covered = np.asarray(found.covers({"image": np.inf}, max_missing=1))
  np.testing.assert_array_equal(covered[clear], worst[clear] > 0)
  assert 0 < covered.sum() < 2000


def test_absent_and_broken_examples_have_no_drop():
  embeddings, rows, bias, _ = _bounded(6, batch=4)
  terms = {m: jnp.asarray(embeddings[m] @ rows[m].T, jnp.float32) for m in rows}
  terms["text"] = terms["text"].at[1].set(jnp.nan)
  present = {m: jnp.asarray([m != "image", True, True, False]) for m in rows}
  stated = heads.geometry(rows, bias, embedding_radius=RADII)
  found = certification.margin_certificate(
    terms,
    certification.tables.global_tables(stated),
    present,
    bias=stated.bias,
  )
  assert np.all(found.drops["image"][0] == 0)
  assert found.covers({"image": np.inf})[0] == found.covers({})[0]
  assert found.radius[1] == 0
  assert not found.covers({"image": np.inf})[1]
  assert not any(np.any(np.isnan(x)) for x in jax.tree.leaves(found.drops))
  assert np.isinf(found.radius[3])
  assert not found.valid[3]


def test_bad_radii_are_refused_by_name():
  rows, bias = heads.head(0)
  for radii, match in (
    ({"nose": 1.0}, "embedding_radius names the unknown modality 'nose'"),
    ({"text": -1.0}, r"embedding_radius\['text'\]"),
  ):
    stated = heads.geometry(rows, bias, embedding_radius=radii)
    with pytest.raises(ValueError, match=match):
      certification.tables.global_tables(stated)
  for radius in (0.0, -1.0, np.inf, np.nan, 1e-60):
    with pytest.raises(ValueError, match="embedding_radius"):
      encoders.make("mlp", embedding_radius=radius)
  with pytest.raises(ValueError, match="Did you mean 'embedding_radius'"):
    encoders.make("mlp", embeding_radius=1.0)


def _stated(true=1.5, radius=1.5, constant=None):
  """Embeddings of ``image`` in a ball; what is said of it may be a lie."""
  plain = hand.late_fusion(
    lambda params, m, x: functional.project(x, true) if m == "image" else x,
    lambda params: {"audio": 1.0, "image": constant},
    modalities=("audio", "image"),
    num_classes=4,
  )

  def geometry(params):
    return dataclasses.replace(
      plain.geometry(params), embedding_radius={"image": radius}
    )

  return dataclasses.replace(plain, geometry=geometry)


def _weak(seed=0):
  params = hand.random_params(seed, width=None)
  return {
    **params,
    "head": {**params["head"], "image": 0.2 * params["head"]["image"]},
  }


def test_an_embedding_radius_that_the_batch_refutes_is_refused():
  params, batch = _weak(), hand.random_batch(0, 50)
  kept = rmm.certify(_stated(), params, batch)
  assert np.any(kept.covers({"image": np.inf}))
  liar = _stated(radius=1.4)
  with pytest.raises(ValueError, match=r"embedding_radius\['image'\]"):
    rmm.certify(liar, params, batch)
  found = jax.jit(lambda p, b: rmm.certify(liar, p, b))(params, batch)
  long = np.linalg.norm(batch["inputs"]["image"], axis=-1) > 1.4 * (1 + 1e-5)
  assert 0 < long.sum() < 50
  np.testing.assert_array_equal(np.asarray(found.radius) == 0, long)
  assert not np.any(np.asarray(found.covers({}))[long])


@pytest.mark.parametrize("constant", [None, np.inf])
def test_replacement_is_certified_without_a_constant(constant):
  """The same answers to inf as with one; none to anything less."""
  params, batch = _weak(), hand.random_batch(0, 200, absent=0.2)
  known = rmm.certify(_stated(constant=1.0), params, batch)
  model = _stated(constant=constant)
  tables = certification.sensitivity_tables(model, params)
  found = rmm.certify(model, params, batch)
  cached = rmm.certify(model, params, batch, tables=tables)
  for other in (found, cached):
    assert not any(
      np.any(np.isnan(leaf))
      for leaf in jax.tree.leaves(other)
      if leaf.dtype.kind == "f"
    )
    for budget in ({"image": np.inf}, {"image": np.inf, "audio": 0.1}):
      covered = np.asarray(other.covers(budget))
      np.testing.assert_array_equal(covered, known.covers(budget))
      assert 0 < covered.sum() < 200
    np.testing.assert_array_equal(
      other.covers({"audio": 0.3}), known.covers({"audio": 0.3})
    )
    np.testing.assert_array_equal(other.covers({}), known.covers({}))
  here = np.asarray(batch["present"]["image"])
  anything = np.asarray(found.covers({"image": np.inf}))
  # Less than anything is certified only where anything is.
  np.testing.assert_array_equal(
    np.asarray(found.modality_radius["image"]), np.where(anything, np.inf, 0)
  )
  np.testing.assert_array_equal(np.asarray(found.radius) > 0, anything)
  np.testing.assert_array_equal(
    found.covers({"image": 1e-6})[here], anything[here]
  )
  # Sizes of image are free there: what is left is audio, with its cap spent.
  reach = found.frontier("image", "audio", jnp.asarray([0.0, 1e-6, 1e6]))
  np.testing.assert_allclose(
    reach[:, 0], known.modality_radius["audio"], rtol=1e-5, atol=3e-6
  )
  np.testing.assert_array_equal(reach[:, 1], reach[:, 2])
  shares = sum(np.asarray(v) for v in found.vulnerability.values())
  np.testing.assert_allclose(shares[found.valid], 1, rtol=1e-5)
  assert certification.recheck_fp64(model, params, batch, found) == 0


def test_without_constant_and_radius_there_is_still_no_certificate():
  params, batch = _weak(), hand.random_batch(0, 20)
  with pytest.raises(ValueError, match="'image' states no Lipschitz bound"):
    rmm.certify(_stated(radius=None), params, batch)
  geometry = certification.abstract_geometry(_stated(), params)
  assert certification.missing_constants(geometry) == ("image",)
  assert certification.missing_constants(geometry, bounded=True) == ()
  # No radius is trained for on an infinite sensitivity.
  with pytest.raises(ValueError, match="'image' states no Lipschitz bound"):
    certification.sensitivity(
      _stated().geometry(params), np.zeros(20, int), batch["present"]
    )
