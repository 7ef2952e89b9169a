"""certify() on models: sources, transformations, refusals, rechecks."""

import dataclasses

import certification_models as models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

import robust_mm as rmm
from robust_mm import certification

NAMES = ("audio", "image")


@pytest.fixture(scope="module")
def mlp():
  return models.mlp(), models.random_params(0)


@pytest.fixture(scope="module")
def batch():
  return models.random_batch(1, 64, absent=0.2)


@pytest.fixture(scope="module")
def found(mlp, batch):
  model, params = mlp
  return jax.jit(lambda p, b: rmm.certify(model, p, b))(params, batch)


def _flat(certificate):
  return {
    jax.tree_util.keystr(path): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(certificate)
  }


def _assert_same(found, expected, rtol=1e-6):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for path, value in _flat(expected).items():
    np.testing.assert_allclose(
      _flat(found)[path], value, rtol=rtol, atol=1e-6, err_msg=path
    )


def test_certificate_is_sound_and_about_the_models_prediction(
  mlp, batch, found
):
  model, params = mlp
  outputs, _ = model.apply(params, {}, batch["inputs"], batch["present"])
  assert found.sound
  assert found.source == "global"
  assert found.fusion == "additive"
  np.testing.assert_array_equal(found.prediction, np.argmax(outputs.logits, -1))
  np.testing.assert_array_equal(
    found.valid, np.logical_or(*batch["present"].values())
  )
  assert np.all(np.isinf(found.radius[~found.valid]))
  assert np.all(np.isfinite(found.radius[found.valid]))


def test_cached_tables_and_eager_calls_give_the_same(mlp, batch, found):
  model, params = mlp
  tables = certification.sensitivity_tables(model, params)
  _assert_same(rmm.certify(model, params, batch), found)
  _assert_same(rmm.certify(model, params, batch, tables=tables), found)


def test_present_may_be_left_out(mlp, batch):
  model, params = mlp
  everything = {m: jnp.ones(64, bool) for m in NAMES}
  _assert_same(
    rmm.certify(model, params, {"inputs": batch["inputs"]}),
    rmm.certify(model, params, {**batch, "present": everything}),
  )


def test_absent_inputs_do_not_matter(mlp, batch, found):
  model, params = mlp
  poisoned = {
    m: jnp.where(batch["present"][m][:, None], x, jnp.nan)
    for m, x in batch["inputs"].items()
  }
  _assert_same(rmm.certify(model, params, {**batch, "inputs": poisoned}), found)


def test_balls_of_differently_predicted_points_never_overlap(mlp):
  model, params = mlp
  batch = models.random_batch(2, 200)
  units = certification.relative_units(batch)
  found = rmm.certify(model, params, batch, units=units)
  joined = np.concatenate(
    [np.asarray(batch["inputs"][m]) / units[m] for m in NAMES], axis=1
  ).astype(float)
  distance = np.linalg.norm(joined[:, None] - joined[None], axis=-1)
  radius = np.asarray(found.radius, float)
  total = radius[:, None] + radius[None]
  differ = np.not_equal.outer(found.prediction, found.prediction)
  assert np.all(total[differ] <= distance[differ])
  assert (total[differ] / distance[differ]).max() > 0.1
  # Inflated constants of the encoder's Lipschitz bound must be refuted.
  exact = models.identity()
  plain = models.random_params(3, width=None)
  found = rmm.certify(exact, plain, batch)
  raw = np.concatenate([np.asarray(batch["inputs"][m]) for m in NAMES], 1)
  distance = np.linalg.norm(raw[:, None] - raw[None], axis=-1)
  radius = np.asarray(found.radius, float)
  differ = np.not_equal.outer(found.prediction, found.prediction)
  total = (radius[:, None] + radius[None])[differ]
  assert np.all(total <= distance[differ])
  assert np.any(4 * total > distance[differ])


def _attack(model, params, batch, found, budgets, steps=60, restarts=2):
  """Projected gradient descent on the margin; True where it flips."""

  def margin(inputs):
    outputs, _ = model.apply(params, {}, inputs, batch["present"])
    logits, y = outputs.logits, found.prediction
    own = jnp.take_along_axis(logits, y[:, None], -1)
    chosen = jax.nn.one_hot(y, logits.shape[-1], dtype=bool)
    return jnp.squeeze(own, -1) - jnp.max(
      jnp.where(chosen, -jnp.inf, logits), -1
    )

  gradient = jax.grad(lambda inputs: jnp.sum(margin(inputs)))

  def scaled(tree, size):
    total = jnp.sqrt(sum(jnp.sum(x**2, -1) for x in tree.values()))
    scale = size / jnp.maximum(total, 1e-12)
    return {m: x * scale[:, None] for m, x in tree.items()}

  @jax.jit
  def run(key):
    keys = dict(zip(NAMES, jax.random.split(key)))
    noise = {
      m: jax.random.normal(keys[m], x.shape) for m, x in batch["inputs"].items()
    }
    delta = scaled(noise, budgets * 0.5)

    def step(carry, _):
      delta, flipped = carry
      moved = {m: batch["inputs"][m] + delta[m] for m in NAMES}
      flipped = flipped | (margin(moved) <= 0)
      down = scaled(gradient(moved), budgets * 0.2)
      delta = {m: delta[m] - down[m] for m in NAMES}
      total = jnp.sqrt(sum(jnp.sum(x**2, -1) for x in delta.values()))
      shrink = jnp.minimum(1, budgets / jnp.maximum(total, 1e-12))
      return ({m: x * shrink[:, None] for m, x in delta.items()}, flipped), None

    carry = delta, jnp.zeros(budgets.shape, bool)
    return jax.lax.scan(step, carry, length=steps)[0][1]

  return np.any([run(jax.random.key(i)) for i in range(restarts)], axis=0)


def test_no_attack_inside_the_radius_and_a_wrong_constant_is_refuted(mlp):
  model, params = mlp
  batch = models.random_batch(4, 128)
  found = rmm.certify(model, params, batch)
  assert not np.any(_attack(model, params, batch, found, found.radius * 0.999))
  tables = certification.sensitivity_tables(model, params)
  wrong = dataclasses.replace(
    tables, tables={m: 0.2 * t for m, t in tables.tables.items()}
  )
  cheat = rmm.certify(model, params, batch, tables=wrong)
  flipped = _attack(model, params, batch, cheat, cheat.radius * 0.999)
  assert flipped.mean() > 0.3


def test_vmap_over_a_leading_axis_agrees(mlp, batch, found):
  model, params = mlp
  stacked = jax.tree.map(lambda x: x.reshape(4, 16, *x.shape[1:]), batch)
  many = jax.vmap(lambda b: rmm.certify(model, params, b))(stacked)
  for path, value in _flat(found).items():
    if not path.startswith(".units"):
      flat = _flat(many)[path]
      flat = flat.reshape(value.shape)
      np.testing.assert_allclose(flat, value, rtol=1e-5, atol=1e-5)
  budgets = {"image": 0.05}
  np.testing.assert_array_equal(
    many.covers(budgets, 1).reshape(-1), found.covers(budgets, 1)
  )


@pytest.mark.parametrize("source", ["local", "relaxation", "best"])
def test_balls_agree_under_vmap_and_on_eight_devices(mlp, batch, source):
  model, params = mlp
  batch = jax.tree.map(lambda x: x[:16], batch)
  traces = []

  @jax.jit
  def run(params, batch):
    traces.append(1)
    return rmm.certify(model, params, batch, source=source)

  alone = run(params, batch)
  stacked = jax.tree.map(lambda x: x.reshape(2, 8, *x.shape[1:]), batch)
  many = jax.vmap(lambda b: rmm.certify(model, params, b, source=source))(
    stacked
  )
  mesh = jax.make_mesh((8,), ("data",))
  rows = NamedSharding(mesh, PartitionSpec("data"))
  whole = NamedSharding(mesh, PartitionSpec())
  del traces[:]
  other = jax.tree.map(lambda x: x[:16], models.random_batch(9, 64))
  with jax.set_mesh(mesh):  # jax 0.12 wants it where axes are explicit
    spread = run(jax.device_put(params, whole), jax.device_put(batch, rows))
    run(jax.device_put(params, whole), jax.device_put(other, rows))
  assert len(traces) <= 1
  # A bisection may stop one step apart.
  for name in ("radius", *(f"modality_radius.{m}" for m in NAMES)):
    get = lambda c, name=name: (  # noqa: E731
      c.radius if name == "radius" else c.modality_radius[name.split(".")[1]]
    )
    for again in (spread, many):
      np.testing.assert_allclose(
        np.reshape(get(again), -1), get(alone), rtol=1e-4, atol=1e-6
      )


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_eight_devices_agree_and_compile_once(mlp, batch, found, axis_type):
  model, params = mlp
  mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
  rows = NamedSharding(mesh, PartitionSpec("data"))
  whole = NamedSharding(mesh, PartitionSpec())
  traces = []

  @jax.jit
  def run(params, batch):
    traces.append(1)
    return rmm.certify(model, params, batch)

  with jax.set_mesh(mesh):
    sharded = run(jax.device_put(params, whole), jax.device_put(batch, rows))
    other = jax.device_put(models.random_batch(9, 64), rows)
    run(jax.device_put(params, whole), other)
  assert len(traces) == 1
  assert sharded.radius.sharding.is_equivalent_to(rows, 1)
  _assert_same(sharded, found, rtol=1e-5)


def test_units_norm_and_fidelity_reach_the_certificate(mlp, batch):
  model, params = mlp
  plain = rmm.certify(model, params, batch)
  found = rmm.certify(
    model, params, batch, units={"audio": 2.0}, norm={"image": "linf"}
  )
  assert found.norm == (("audio", "l2"), ("image", "linf"))
  np.testing.assert_allclose(
    found.modality_radius["audio"] * 2,
    plain.modality_radius["audio"],
    rtol=1e-5,
  )
  np.testing.assert_allclose(
    found.modality_radius["image"] * np.sqrt(7),
    plain.modality_radius["image"],
    rtol=1e-5,
  )


def test_models_without_a_margin_certificate_are_refused(mlp, batch):
  model, params = mlp
  bare = dataclasses.replace(model, geometry=None)
  with pytest.raises(ValueError, match="no geometry"):
    rmm.certify(bare, params, batch)

  def fuse(params, embeddings, present):
    return dataclasses.replace(
      model.fuse(params, embeddings, present), mixed=True
    )

  mixed = dataclasses.replace(model, fuse=fuse)
  with pytest.raises(ValueError, match="mixes modalities"):
    rmm.certify(mixed, params, batch)


def test_a_geometry_that_does_not_explain_the_logits_certifies_nothing(
  mlp, batch
):
  model, params = mlp

  def fuse(params, embeddings, present):
    outputs = model.fuse(params, embeddings, present)
    number = sum(p.astype(jnp.float32) for p in present.values())
    scale = 1 / jnp.maximum(number, 1)[:, None]
    return dataclasses.replace(outputs, logits=outputs.logits * scale)

  averaging = dataclasses.replace(model, fuse=fuse)
  with pytest.raises(ValueError, match="geometry does not explain"):
    rmm.certify(averaging, params, batch)
  found = jax.jit(lambda b: rmm.certify(averaging, params, b))(batch)
  both = np.logical_and(*batch["present"].values())
  assert np.all(found.radius[both] == 0)
  assert not np.any(found.covers({})[both])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sixteen_bit_arithmetic_is_refused(mlp, batch, dtype):
  model, params = mlp
  low = jax.tree.map(lambda x: x.astype(dtype), params)
  halved = {m: x.astype(dtype) for m, x in batch["inputs"].items()}
  with pytest.raises(ValueError, match=jnp.dtype(dtype).name):
    rmm.certify(model, low, {**batch, "inputs": halved})

  def encode(params, state, inputs, present, **kwargs):
    narrow = {m: x.astype(dtype).astype(x.dtype) for m, x in inputs.items()}
    return model.encode(params, state, narrow, present, **kwargs)

  hidden = dataclasses.replace(model, encode=encode)
  with pytest.raises(ValueError, match=jnp.dtype(dtype).name):
    jax.jit(lambda b: rmm.certify(hidden, params, b))(batch)


@pytest.mark.parametrize(
  "change, match",
  [
    ({"inputs": {"audio": jnp.zeros((2, 5))}}, "no modality 'image'"),
    ({"present": {"audio": jnp.ones(64, bool)}}, "no modality 'image'"),
  ],
)
def test_incomplete_batches_are_refused_by_name(mlp, batch, change, match):
  model, params = mlp
  with pytest.raises(ValueError, match=match):
    rmm.certify(model, params, {**batch, **change})


def test_recheck_in_float64_confirms_and_can_refute(mlp, batch, found):
  model, params = mlp
  assert certification.recheck_fp64(model, params, batch, found) == 0
  inflated = dataclasses.replace(found, radius=found.radius * 1.001)
  finite = int(np.sum(np.isfinite(found.radius) & (found.radius > 0)))
  refuted = certification.recheck_fp64(model, params, batch, inflated)
  assert refuted >= finite - 2
  estimated = dataclasses.replace(found, sound=False)
  with pytest.raises(ValueError, match="estimated"):
    certification.recheck_fp64(model, params, batch, estimated)


def test_relative_units_are_the_median_distance_to_the_mean():
  batch = models.random_batch(8, 50, absent=0.3)
  units = certification.relative_units(batch)
  kept = np.asarray(batch["inputs"]["audio"], float)
  kept = kept[np.asarray(batch["present"]["audio"])]
  expected = np.median(np.linalg.norm(kept - kept.mean(0), axis=-1))
  np.testing.assert_allclose(units["audio"], expected)
  constant = {"inputs": {"audio": np.ones((4, 3))}}
  with pytest.raises(ValueError, match="'audio'"):
    certification.relative_units(constant)


def test_certified_accuracy_counts_valid_correct_and_proved(found):
  label = np.asarray(found.prediction).copy()
  label[::3] = (label[::3] + 1) % 4
  valid = np.asarray(found.valid)
  right = label == np.asarray(found.prediction)
  grid = np.array([0.0, 0.02, 0.1])
  expected = [
    (right & (np.asarray(found.radius) > r))[valid].mean() for r in grid
  ]
  np.testing.assert_allclose(
    certification.certified_accuracy(found, label, grid), expected, rtol=1e-6
  )
  alone = certification.certified_accuracy(found, label, 0.05, modality="image")
  expected = right & (np.asarray(found.modality_radius["image"]) > 0.05)
  np.testing.assert_allclose(alone, expected[valid].mean(), rtol=1e-6)
  budgets = {"image": 0.02}
  covered = np.asarray(found.covers(budgets, 1))
  np.testing.assert_allclose(
    certification.certified_accuracy(
      found, label, budgets=budgets, max_missing=1
    ),
    (right & covered)[valid].mean(),
    rtol=1e-6,
  )
  with pytest.raises(ValueError, match="either radius or budgets"):
    certification.certified_accuracy(found, label)


def test_wilson_interval_equals_scipy():
  stats = pytest.importorskip("scipy.stats")
  for successes in (0, 3, 90, 100):
    expected = stats.binomtest(successes, 100).proportion_ci(0.95, "wilson")
    np.testing.assert_allclose(
      certification.wilson_interval(successes, 100),
      [expected.low, expected.high],
      atol=1e-12,
    )


def test_a_second_call_outside_jit_compiles_nothing(mlp, caplog):
  model, params = mlp
  batches = [models.random_batch(seed, 32) for seed in (20, 21)]
  rmm.certify(model, params, batches[0])
  caplog.clear()
  with jax.log_compiles():
    rmm.certify(model, params, batches[1])
  assert not [r for r in caplog.records if "Compiling" in r.getMessage()]
  with jax.log_compiles():
    rmm.certify(model, params, models.random_batch(22, 33))
  assert [r for r in caplog.records if "Compiling" in r.getMessage()]
