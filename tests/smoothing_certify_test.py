"""certify: closed forms of linear models, attacks, batching, edge cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import smoothing_models as linear
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
from scipy import special

from robust_mm import models
from robust_mm import smoothing
from robust_mm.models import encoders
from robust_mm.smoothing import bounds

SIGMA = {"left": 0.5, "right": 0.25}
KEY = jax.random.key(7)


def certify(vectors, batch, **options):
  options = {"num_estimation": 1000, **options}
  noise = options.pop("noise", smoothing.gaussian(sigma=SIGMA))
  return smoothing.certify(
    linear.linear(vectors), batch, noise, options.pop("key", KEY), **options
  )


def test_exact_chance_gives_the_distance_to_the_boundary():
  vectors, batch = linear.weights(), linear.batch()
  chance = linear.exact_chance(vectors, batch["inputs"], SIGMA)
  z = np.abs(linear.score(vectors, batch["inputs"]))
  scale = linear.spread(vectors, SIGMA)
  np.testing.assert_allclose(bounds.reach(chance), z / scale, rtol=1e-6)


def test_sampled_radius_is_below_the_exact_one_and_close_to_it():
  """1000 runs each: alpha wrong ones at most; 0.9 of it at n = 1e4."""
  vectors = linear.weights()
  scale = linear.spread(vectors, SIGMA)
  wanted = 1.0  # of the joint radius R
  direction = {n: v / np.sum(np.square(v)) for n, v in vectors.items()}
  point = {n: 0.5 * wanted * scale * v for n, v in direction.items()}
  runs, alpha = 1000, 0.05
  batch = {
    "inputs": {
      n: np.broadcast_to(v, (runs, *v.shape)).astype(np.float32)
      for n, v in point.items()
    }
  }
  exact = linear.score(vectors, batch["inputs"])[0] / scale
  found = certify(vectors, batch, num_estimation=10_000, alpha=alpha)
  radius = bounds.reach(found.p_lower.astype(np.float64))
  wrong = np.mean(radius > exact)
  assert wrong <= alpha + 3 * np.sqrt(alpha * (1 - alpha) / runs)
  assert wrong > 0, "a bound that is never wrong at 5 % is not tight"
  assert np.mean(radius) >= 0.9 * exact
  # What is no bound fails the same test.
  hits = found.counts.max(axis=-1) / found.num_estimation
  assert np.mean(special.ndtri(hits) > exact) > 0.3


def test_radii_and_budgets_are_those_of_the_formula():
  vectors, batch = linear.weights(), linear.batch()
  units = {"left": 2.0, "right": 1.0}
  found = certify(vectors, batch, units=units)
  reach = np.where(
    found.prediction >= 0, special.ndtri(found.p_lower.astype(np.float64)), 0
  )
  assert np.sum(reach > 0.5) > 3
  alone = found.modality_radius
  np.testing.assert_allclose(alone["left"], reach * 0.5 / 2, rtol=1e-6)
  np.testing.assert_allclose(alone["right"], reach * 0.25, rtol=1e-6)
  np.testing.assert_allclose(found.radius, reach * 0.25, rtol=1e-6)
  assert found.radius.dtype == np.float32
  # On the ellipse: 0.6 and 0.8 of the way.
  edge = {"left": 0.6 * reach * 0.25, "right": 0.8 * reach * 0.25}
  held = found.prediction >= 0
  for factor, inside in ((0.999, held), (1.001, False)):
    budget = {name: factor * size for name, size in edge.items()}
    np.testing.assert_array_equal(found.covers(budget), inside)
  np.testing.assert_array_equal(found.covers({}), held)
  assert not found.covers({"left": np.inf}).any()


def gradient(vectors, sigma):
  """The steepest direction of z in the coordinates of the noise, per size."""
  scale = linear.spread(vectors, sigma)
  return {n: sigma[n] ** 2 * v / scale for n, v in vectors.items()}


def test_attack_inside_the_radius_never_flips_and_beyond_it_does():
  """PGD on the smoothed model; its chance of a class is known exactly."""
  vectors = linear.weights()
  batch = linear.batch(60)
  found = certify(vectors, batch, num_estimation=10_000)
  held = found.prediction >= 0
  reach = bounds.reach(found.p_lower.astype(np.float64))
  sign = np.where(found.prediction == 0, -1.0, 1.0)

  def chance(inputs):
    """Of the prediction, exactly."""
    z = linear.score(vectors, inputs) / linear.spread(vectors, SIGMA)
    return special.ndtr(-sign * z)

  def attack(factor):
    """Projected steps on the ellipse of size factor * reach."""
    size = np.where(held, factor * reach, 0.0)
    delta = {n: np.zeros_like(x) for n, x in batch["inputs"].items()}
    for _ in range(20):
      for name, step in gradient(vectors, SIGMA).items():
        moved = sign[:, None] * step[None] * size[:, None]
        delta[name] = delta[name] + 0.25 * moved
      length = np.sqrt(
        sum(np.sum(d**2, -1) / SIGMA[n] ** 2 for n, d in delta.items())
      )
      shrink = np.minimum(1, size / np.maximum(length, 1e-12))
      delta = {n: d * shrink[:, None] for n, d in delta.items()}
    moved = {n: batch["inputs"][n] + d for n, d in delta.items()}
    return chance(moved) <= 0.5

  assert held.sum() > 30
  # alpha = 1e-3 for each of 60: with this key none is wrong.
  assert not np.any(attack(0.999)[held])
  exact = np.abs(linear.score(vectors, batch["inputs"]))
  exact = exact / linear.spread(vectors, SIGMA)
  tight = held & (exact < 3) & (reach > 0.5)
  assert tight.sum() > 10
  assert np.mean(attack(1.2)[tight]) > 0.9


def test_counts_do_not_depend_on_batching():
  vectors, batch = linear.weights(), linear.batch(11)
  whole = certify(vectors, batch)
  for size in (1, 5):
    for start in range(0, 11, size):
      rows = slice(start, start + size)
      part = jax.tree.map(lambda x, rows=rows: x[rows], batch)
      found = certify(vectors, part)
      np.testing.assert_array_equal(found.counts, whole.counts[rows])
      np.testing.assert_array_equal(found.selection, whole.selection[rows])
  order = np.random.default_rng(0).permutation(11)
  moved = certify(vectors, jax.tree.map(lambda x: x[order], batch))
  np.testing.assert_array_equal(moved.counts, whole.counts[order])
  other = certify(vectors, {**batch, "id": batch["id"] + 1})
  assert np.any(other.counts != whole.counts), "the id decides nothing"


@pytest.mark.parametrize("kind", ["gaussian", "mixed"])
def test_counts_do_not_depend_on_sharding(kind):
  vectors, batch = linear.weights(), linear.batch(16)
  noise = smoothing.gaussian(sigma=SIGMA)
  if kind == "mixed":
    noise = smoothing.mixed(sigma={"right": 0.25}, keep={"left": 2})
  alone = certify(vectors, batch, noise=noise)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  sharding = NamedSharding(mesh, PartitionSpec("data"))
  spread = certify(vectors, jax.device_put(batch, sharding), noise=noise)
  np.testing.assert_array_equal(spread.counts, alone.counts)
  np.testing.assert_array_equal(spread.prediction, alone.prediction)


def test_chunks_add_up_in_any_grouping_and_the_last_one_is_cut():
  vectors, batch = linear.weights(), linear.batch(5)
  predict = linear.linear(vectors)
  noise = smoothing.gaussian(sigma=SIGMA)

  def count(start, num_chunks):
    return np.asarray(
      smoothing.count_classes(
        predict,
        batch["inputs"],
        batch["present"],
        batch["id"],
        KEY,
        start,
        230,
        noise=noise,
        num_chunks=num_chunks,
        chunk_size=50,
      )
    )

  whole = count(0, 5)
  assert np.all(whole.sum(axis=-1) == 230)
  assert whole.dtype == np.int32
  np.testing.assert_array_equal(count(0, 2) + count(2, 3), whole)
  np.testing.assert_array_equal(count(3, 2) + count(0, 3), whole)
  assert not np.any(count(5, 2))


def test_selection_and_estimation_see_different_noise():
  vectors, batch = linear.weights(), linear.batch(40)
  found = certify(vectors, batch, num_selection=1000, num_estimation=1000)
  assert np.mean(np.any(found.selection != found.counts, axis=-1)) > 0.5


def test_undecided_examples_abstain_and_cover_nothing():
  vectors = linear.weights()
  zeros = {n: np.zeros((3, d), np.float32) for n, d in linear.SIZES.items()}
  found = certify(vectors, {"inputs": zeros})
  assert found.prediction.tolist() == [-1] * 3
  assert not found.radius.any()
  assert not found.covers({}).any()
  assert np.all(found.p_lower < 0.5)
  assert found.valid.all()


def test_input_that_is_no_number_abstains():
  vectors, batch = linear.weights(), linear.batch(4)
  batch["inputs"]["left"] += 10 * vectors["left"]
  for row, value in enumerate((np.nan, np.inf)):
    batch["inputs"]["left"][row, 0] = value
  batch["inputs"]["left"][2] = np.nan
  batch["present"]["left"][2] = False  # absent: not read
  batch["inputs"]["right"][2] = 10 * vectors["right"]
  found = certify(vectors, batch)
  assert found.prediction.tolist() == [-1, -1, 0, 0]
  assert not found.counts[:2].any()
  assert np.all(np.isfinite(found.p_lower))


def test_logits_that_are_no_numbers_count_for_no_class():
  def predict(inputs, present):
    del present
    x = inputs["a"]
    return jnp.where(x > 0, jnp.concatenate([x, -x], -1), jnp.nan)

  batch = {"inputs": {"a": np.array([[0.3], [5.0]], np.float32)}}
  found = smoothing.certify(
    predict, batch, smoothing.gaussian(sigma=1.0), KEY, num_estimation=500
  )
  assert 0.5 < found.counts[0].sum() / 500 < 0.75
  assert found.counts[1].sum() == 500
  assert found.p_lower[0] < found.counts[0, 0] / 500


def test_missing_modality_has_no_noise_and_cannot_be_attacked():
  vectors, batch = linear.weights(), linear.batch(6)
  batch["present"]["left"][:3] = False
  batch["present"]["right"][0] = False
  batch["inputs"]["right"] += 3 * vectors["right"]
  found = certify(vectors, batch)
  # Row 0: the base classifier sees zeros only, so every vote is the same.
  assert found.counts[0].tolist() == [1000, 0]
  assert found.valid.tolist() == [False, True, True, True, True, True]
  assert np.isposinf(found.radius[0])
  alone = found.modality_radius
  assert np.all(np.isposinf(alone["left"][:3]))
  # Only the noise of what is there counts for the joint ball.
  np.testing.assert_array_equal(found.radius[1:3], alone["right"][1:3])
  np.testing.assert_array_equal(
    found.covers({"left": 1e6})[:3], found.prediction[:3] >= 0
  )
  # Alone, the right one is at its own distance in closed form.
  z = linear.score({"right": vectors["right"]}, batch["inputs"])
  scale = linear.spread({"right": vectors["right"]}, SIGMA)
  exact = np.minimum(z / scale, 2.46)
  reach = bounds.reach(found.p_lower.astype(np.float64))
  assert np.all(np.abs(reach[1:3] - exact[1:3]) < 0.35)


def test_modality_without_noise_must_not_change():
  vectors, batch = linear.weights(), linear.batch()
  found = certify(vectors, batch, noise=smoothing.gaussian(sigma={"left": 0.5}))
  held = found.prediction >= 0
  assert held.any()
  assert not found.radius.any()
  assert not found.modality_radius["right"].any()
  assert not found.covers({"right": 1e-9}).any()
  np.testing.assert_array_equal(found.covers({"right": 0.0}), held)


@pytest.mark.parametrize("fusion", ["late", "token"])
def test_any_model_is_certified_and_parameters_are_no_constants(fusion):
  build = {
    "late": models.late_fusion,
    "token": models.token_fusion,
  }[fusion]
  encoder = encoders.mlp(hidden_sizes=(8,), embedding_dim=8)
  model = build(
    {"left": encoder, "right": encoder},
    num_classes=3,
    input_shapes={n: (d,) for n, d in linear.SIZES.items()},
  )
  params, state = model.init(jax.random.key(0))
  batch, noise = linear.batch(3), smoothing.gaussian(sigma=0.5)

  def run(params):
    return smoothing.certify(
      model,
      batch,
      noise,
      KEY,
      params=params,
      state=state,
      num_estimation=250,
    )

  found = run(params)
  assert np.all(found.counts.sum(axis=-1) == 250)
  with jax.log_compiles():
    other = jax.tree.map(lambda x: 2 * x, params)
    before = smoothing.count_classes._cache_size()
    run(other)
    assert smoothing.count_classes._cache_size() == before
  predict = smoothing.predict_fn(model, params, state)
  same = smoothing.certify(predict, batch, noise, KEY, num_estimation=250)
  np.testing.assert_array_equal(same.counts, found.counts)


def arguments(**changes):
  given = {
    "predict": linear.linear(linear.weights()),
    "batch": linear.batch(2),
    "noise": smoothing.gaussian(sigma=0.5),
    "key": KEY,
    "num_estimation": 50,
  }
  return {**given, **changes}


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"alpha": 0.0}, "alpha must lie"),
    ({"alpha": 1.0}, "alpha must lie"),
    ({"num_estimation": 0}, "num_estimation"),
    ({"num_selection": 0}, "num_selection"),
    ({"chunk_size": 0}, "chunk_size"),
    ({"units": {"up": 1.0}}, "units names the unknown modality 'up'"),
    ({"units": {"left": 0.0}}, r"units\['left'\]"),
    ({"noise": smoothing.gaussian(sigma={"up": 1.0})}, "sigma names .* 'up'"),
    ({"noise": smoothing.subsample(keep={"left": 5})}, r"keep\['left'\].*4"),
    (
      {"noise": smoothing.subsample(keep={"left": 2}, axes={"left": (1,)})},
      r"axes\['left'\]",
    ),
    ({"batch": {"inputs": {}}}, "at least one modality"),
    (
      {"batch": {**linear.batch(2), "id": np.arange(3)}},
      r"batch\['id'\]",
    ),
    (
      {"batch": {**linear.batch(2), "present": {"left": np.ones(3, bool)}}},
      "presence of 'left'",
    ),
    (
      {"predict": lambda inputs, present: jnp.zeros((50, 1))},
      "at least two classes",
    ),
    (
      {"predict": lambda inputs, present: jnp.zeros(50, jnp.int32)},
      "predict must return logits",
    ),
    (
      {"predict": lambda inputs, present: (jnp.zeros((50, 3)), {})},
      "predict must return logits .* got a tuple",
    ),
    ({"batch": linear.batch(2)["inputs"]}, "batch needs inputs"),
  ],
)
def test_bad_input_is_named(changes, words):
  with pytest.raises(ValueError, match=words):
    smoothing.certify(**arguments(**changes))


@pytest.mark.parametrize("key", [0, None, np.zeros(2, np.float32)])
def test_what_is_no_key_is_named(key):
  # Without the type checks of these tests, as users call it.
  with pytest.raises(ValueError, match=r"^key must be .*random.key\(0\), got"):
    smoothing.certify.__wrapped__(**arguments(key=key))


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan"), {"left": 0.0}, {}])
def test_bad_sigma_is_named(sigma):
  with pytest.raises(ValueError, match="sigma"):
    smoothing.gaussian(sigma=sigma)


def test_model_without_parameters_is_refused():
  encoder = encoders.mlp(hidden_sizes=(8,), embedding_dim=8)
  model = models.token_fusion(
    {"left": encoder}, num_classes=3, input_shapes={"left": (4,)}
  )
  with pytest.raises(ValueError, match="params"):
    smoothing.certify(**arguments(predict=model))


@pytest.mark.parametrize(
  "budgets, words",
  [
    ({"up": 1.0}, "budgets names the unknown modality 'up'"),
    ({"left": -1.0}, r"budgets\['left'\]"),
    ({"left": float("nan")}, r"budgets\['left'\]"),
    ({"left": "0.1"}, r"budgets\['left'\] must be a number"),
    ({"left": np.ones(5)}, r"budgets\['left'\] .* shape \(5,\)"),
  ],
)
def test_bad_budget_is_named(budgets, words):
  found = smoothing.certify(**arguments())
  with pytest.raises(ValueError, match=words):
    found.covers(budgets)
  with pytest.raises(ValueError, match="change"):
    found.covers({}, change="swap")
