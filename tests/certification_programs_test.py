"""What certify() refuses in a model's program, and rounding inside encoders."""

import dataclasses
import functools

import certification_models as models
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robust_mm as rmm
from robust_mm import certification
from robust_mm import linalg
from robust_mm.certification import programs
from robust_mm.models import encoders

NAMES = ("audio", "image")


@pytest.fixture(scope="module")
def plain():
  params = models.random_params(0, sizes=(5, 5), width=None)
  return models.identity(), params, models.random_batch(1, 16, sizes=(5, 5))


def _changed(model, change):
  """The model with its inputs changed before they are encoded."""

  def encode(params, state, inputs, present, **kwargs):
    return model.encode(params, state, change(inputs), present, **kwargs)

  return dataclasses.replace(model, encode=encode)


def _scan(inputs):
  def step(carry, _):
    one, two = carry
    return (one, two + 0.1 * one), None

  one, two = jax.lax.scan(
    step, (inputs["audio"], inputs["image"]), None, length=2
  )[0]
  return {"audio": one, "image": two}


def _scan_rows(inputs):
  """Slices of one modality meet the carry that began as the other."""
  sound, rows = jax.lax.scan(
    lambda carry, row: (0.5 * carry, row + jnp.sum(carry)),
    inputs["audio"],
    inputs["image"],
  )
  return {"audio": sound, "image": rows}


def _scan_constant(inputs):
  sound = jnp.sum(inputs["audio"])
  _, rows = jax.lax.scan(
    lambda carry, row: (carry + 1, carry * row + sound), 0.0, inputs["image"]
  )
  return {**inputs, "image": rows}


def _scan_twice_removed(inputs):
  """What is read reaches the slices in the third step only."""

  def step(carry, row):
    one, two, three = carry
    return (one, one, two), row + three

  zero = jnp.zeros(())
  _, rows = jax.lax.scan(
    step, (jnp.sum(inputs["audio"]), zero, zero), inputs["image"]
  )
  return {**inputs, "image": rows}


def _while(inputs):
  count = jax.lax.while_loop(
    lambda c: c[0] < jnp.sum(inputs["audio"]),
    lambda c: (c[0] + 1, c[1] * 0.5),
    (0.0, inputs["image"]),
  )
  return {"audio": inputs["audio"], "image": count[1]}


def _cond(inputs):
  image = jax.lax.cond(
    jnp.sum(inputs["audio"]) > 0, jnp.sin, jnp.cos, inputs["image"]
  )
  return {"audio": inputs["audio"], "image": image}


READS = {
  "sum": lambda x: {**x, "image": x["image"] + 5 * x["audio"]},
  "jit": jax.jit(lambda x: {**x, "image": x["image"] + x["audio"]}),
  "relu": lambda x: {**x, "image": jax.nn.relu(x["image"] + x["audio"])},
  "remat": jax.checkpoint(lambda x: {**x, "image": x["image"] + x["audio"]}),
  "scan": _scan,
  "scan over rows": _scan_rows,
  "scan with a constant": _scan_constant,
  "scan with a delay": _scan_twice_removed,
  "while": _while,
  "cond": _cond,
}


@pytest.mark.parametrize("kind", sorted(READS))
def test_an_encoder_that_reads_another_modality_is_refused(plain, kind):
  model, params, batch = plain
  other = _changed(model, READS[kind])
  with pytest.raises(ValueError, match="'image' reads modality 'audio'"):
    rmm.certify(other, params, batch)
  with pytest.raises(ValueError, match="'image' reads modality 'audio'"):
    jax.jit(lambda b: rmm.certify(other, params, b).radius)(batch)


def _together(inputs):
  def step(carry, _):
    return {name: jnp.sin(x) for name, x in carry.items()}, None

  both = jax.jit(lambda x: jax.tree.map(jax.nn.relu, x))(inputs)
  both = jax.lax.scan(step, both, None, length=2)[0]
  factor = jnp.array(0.9)
  sound, columns = jax.lax.scan(
    lambda carry, column: (factor * carry, factor * jnp.sin(column)),
    both["audio"],
    both["image"].T,
  )
  both = {"audio": sound, "image": columns.T}
  return jax.lax.cond(True, lambda x: x, lambda x: x, both)


def test_modalities_side_by_side_in_one_function_are_accepted(plain):
  model, params, batch = plain
  assert rmm.certify(_changed(model, _together), params, batch).sound


MADE = {
  "mlp": (encoders.mlp(hidden_sizes=(8,), embedding_dim=8), (6,)),
  "cnn": (encoders.make("cnn", embedding_dim=8), (8, 8, 1)),
  "temporal": (encoders.make("temporal_cnn", embedding_dim=8), (4, 8, 8, 1)),
  "lipschitz_mlp": (
    encoders.lipschitz_mlp(width=8, num_blocks=1, embedding_dim=8),
    (6,),
  ),
  "lipschitz_cnn": (encoders.make("lipschitz_cnn", embedding_dim=8), (8, 8, 1)),
  "transformer": (
    encoders.make("transformer", vocabulary_size=20, embedding_dim=8),
    (6,),
  ),
  "resnet": (encoders.resnet18(embedding_dim=8, width=4), (16, 16, 1)),
}


@pytest.mark.parametrize("kind", sorted(MADE))
def test_encoders_of_the_package_are_accepted(kind):
  encoder, shape = MADE[kind]
  model = rmm.models.late_fusion(
    {"a": encoder, "b": encoder},
    num_classes=3,
    input_shapes={"a": shape, "b": shape},
  )
  params, state = jax.eval_shape(model.init, jax.random.key(0))
  dtype = jnp.int32 if kind == "transformer" else jnp.float32
  inputs = {m: jax.ShapeDtypeStruct((2, *shape), dtype) for m in "ab"}
  present = {m: jax.ShapeDtypeStruct((2,), bool) for m in "ab"}

  def run(*arguments):
    return programs.evaluate(model, *arguments).logits

  assert jax.eval_shape(run, params, state, inputs, present).shape == (2, 3)


@pytest.mark.parametrize("size", [1, 16])
def test_an_encoder_with_batch_statistics_is_refused(plain, size):
  model, params, batch = plain
  # Equal rows: neither the mean of the batch nor a row alone would show it.
  batch = jax.tree.map(lambda x: jnp.repeat(x[:1], size, axis=0), batch)
  centred = _changed(
    model, lambda x: jax.tree.map(lambda v: v - 0.1 * jnp.mean(v, 0)[None], x)
  )
  with pytest.raises(ValueError, match="'audio' reads other examples"):
    rmm.certify(centred, params, batch)
  assert not rmm.certify(centred, params, batch, source="empirical").sound
  for source in ("local", "relaxation", "best"):
    with pytest.raises(ValueError, match="reads other examples of the batch"):
      rmm.certify(centred, params, batch, source=source)


@pytest.mark.parametrize("size", [1, 16])
@pytest.mark.parametrize("source", ["local", "relaxation", "best"])
def test_a_function_with_batch_statistics_is_refused(source, size):
  weight = jax.random.normal(jax.random.key(0), (5, 3))

  def fn(share, inputs):
    x = inputs["x"]
    return jnp.tanh(x - share * jnp.mean(x, axis=0)[None]) @ weight

  model = rmm.models.from_function(
    fn, jnp.asarray(0.5), num_classes=3, input_shapes={"x": (5,)}
  )
  x = jax.random.normal(jax.random.key(1), (1, 5))
  batch = {"inputs": {"x": jnp.repeat(x, size, axis=0)}}
  certify = functools.partial(rmm.certify, model, batch=batch, source=source)
  with pytest.raises(ValueError, match="reads other examples of the batch"):
    certify(jnp.asarray(0.5))
  # Inside somebody's jit it cannot be said, and nothing is certified.
  inside = jax.jit(lambda share: certify(share))
  found = inside(jnp.asarray(0.5))
  assert not np.any(found.radius)
  assert not np.any(found.covers({"x": 0.0}))
  # Without the statistics the same function has balls.
  assert np.all(np.asarray(inside(jnp.asarray(0.0)).radius) > 0)


@pytest.mark.parametrize("precision", ["default", "high"])
def test_products_at_less_than_full_precision_are_refused(plain, precision):
  model, params, batch = plain

  def rotated(precision):
    def product(x):
      return jnp.matmul(x, jnp.eye(5), precision=precision)

    return _changed(model, lambda x: jax.tree.map(jax.jit(product), x))

  with pytest.raises(ValueError, match=f"{precision.upper()} in dot_general"):
    rmm.certify(rotated(precision), params, batch)
  for exact in (None, "highest", jax.lax.DotAlgorithmPreset.F32_F32_F32):
    assert rmm.certify(rotated(exact), params, batch).sound

  def smooth(x):
    kernel = jnp.ones((3, 1, 1))
    return jax.lax.conv_general_dilated(
      x[..., None],
      kernel,
      (1,),
      "SAME",
      dimension_numbers=("NWC", "WIO", "NWC"),
      precision=precision,
    )[..., 0]

  with pytest.raises(ValueError, match="conv_general_dilated"):
    rmm.certify(
      _changed(model, lambda x: jax.tree.map(smooth, x)), params, batch
    )


@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_offsets_cancelled_by_a_bias_stay_inside_the_slack(offset):
  encoder = encoders.lipschitz_mlp(width=16, num_blocks=1, embedding_dim=8)
  model = rmm.models.late_fusion(
    {"a": encoder, "b": encoder},
    num_classes=4,
    input_shapes={"a": (24,), "b": (24,)},
  )
  params, state = model.init(jax.random.key(0))
  rng = np.random.default_rng(0)
  base = offset * rng.normal(size=(1, 24))
  batch = {"inputs": {}}
  for name in "ab":
    values = base + rng.normal(size=(128, 24))
    batch["inputs"][name] = values.astype(np.float32)
    first = params["encoders"][name]["first"]
    weight = linalg.newton_schulz(first["weight"])[0]
    first["bias"] = -(weight @ jnp.asarray(base[0], jnp.float32))[None]
  found = rmm.certify(model, params, batch, state=state)
  assert np.mean(found.radius > 0) > 0.5
  wrong = certification.recheck_fp64(model, params, batch, found, state=state)
  assert wrong == 0
  # Without the size of the inputs the same radii are too large.
  slack = certification.Slack(rounding=0.0)
  loose = rmm.certify(model, params, batch, state=state, slack=slack)
  assert certification.recheck_fp64(
    model, params, batch, loose, state=state
  ) > (0 if offset > 1e3 else -1)


def test_ordinary_radii_lose_nothing_to_the_rounding_of_encoders():
  model, params = models.mlp(), models.random_params(0)
  batch = models.random_batch(1, 64)
  found = rmm.certify(model, params, batch)
  without = rmm.certify(
    model, params, batch, slack=certification.Slack(rounding=0.0)
  )
  np.testing.assert_allclose(found.radius, without.radius, rtol=1e-3, atol=1e-5)


def test_a_small_term_that_the_geometry_does_not_know_is_refused(plain):
  model, params, batch = plain

  def fuse(params, embeddings, present):
    outputs = model.fuse(params, embeddings, present)
    return dataclasses.replace(outputs, logits=outputs.logits * (1 + 2e-5))

  hidden = dataclasses.replace(model, fuse=fuse)
  with pytest.raises(ValueError, match="geometry does not explain"):
    rmm.certify(hidden, params, batch)


@pytest.mark.parametrize("sound", [True, False])
def test_sound_is_what_the_tables_say(plain, sound):
  model, params, batch = plain
  tables = certification.sensitivity_tables(model, params)
  assert tables.sound
  tables = dataclasses.replace(tables, sound=sound)
  for source in ("global", "empirical"):
    found = rmm.certify(model, params, batch, source=source, tables=tables)
    assert found.sound is sound


def test_units_may_name_some_modalities_everywhere(plain):
  model, params, batch = plain
  full, some = {"audio": 2.0, "image": 1.0}, {"audio": 2.0}
  geometry = model.geometry(params)
  label = jnp.zeros(16, int)
  given = label, batch["present"]
  radii, rows, losses = [], [], []
  scores = batch["inputs"]
  scores = {m: scores[m] @ params["head"][m].T for m in NAMES}
  factors = {m: jnp.ones(4) for m in NAMES}
  for units in (full, some):
    found = rmm.certify(model, params, batch, units=units)
    assert certification.recheck_fp64(model, params, batch, found) == 0
    radii.append(found.radius)
    rows.append(certification.sensitivity(geometry, *given, units)["audio"])
    step = certification.fit_integration(
      scores,
      *given,
      {m: 1.0 for m in NAMES},
      factors,
      r0=0.1,
      temperature=0.1,
      units=units,
      num_steps=2,
    )
    losses.append(step[2]["loss"])
  for first, second in (radii, rows, losses):
    np.testing.assert_array_equal(first, second)
