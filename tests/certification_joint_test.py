"""Claims about a trunk that a batch refutes, and other claims that fail."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robust_mm as rmm
from robust_mm import losses
from robust_mm.models import encoders

ROWS = jnp.asarray(
  np.linalg.qr(np.ones((4, 4)) + np.eye(4))[0][:3], jnp.float32
)


def _model(*, head=None, steep=1.0, mean=0.0, chain=None, turn=False):
  """Two modalities of two numbers, concatenated; logits by ``ROWS``."""

  def encode(params, state, inputs, present, *, train=False, key=None):
    del params, train, key
    return {
      m: jnp.where(present[m][:, None], x * jnp.array([[1.0, 0.5]]), 0)
      for m, x in inputs.items()
    }, state

  def fuse(params, embeddings, present):
    del params, present
    z = jnp.concatenate([embeddings["a"], embeddings["b"]], axis=-1)
    z = z[:, ::-1] if turn else z
    z = z - mean * jnp.mean(z, axis=0)[None]
    logits = steep * jnp.einsum("bd,kd->bk", z, ROWS, precision="highest")
    return rmm.Outputs(logits=logits, scores=None, embeddings=embeddings)

  def geometry(params):
    del params
    return rmm.Geometry(
      head=head or {"a": ROWS, "b": ROWS},
      bias=jnp.zeros(3),
      lipschitz={"a": 1.0, "b": 1.0},
      chain=chain,
      fusion="joint",
    )

  return rmm.Model(
    modalities=("a", "b"),
    num_classes=3,
    init=lambda key: ({}, {}),
    encode=encode,
    fuse=fuse,
    geometry=geometry,
  )


def _batch(size=6):
  x = jax.random.normal(jax.random.key(0), (2, size, 2))
  return {"inputs": {"a": x[0], "b": x[1]}}


def test_an_honest_geometry_by_hand_is_certified():
  found = rmm.certify(_model(), {}, _batch())
  assert found.sound
  assert np.all(np.asarray(found.radius) > 0)


@pytest.mark.parametrize(
  "wrong",
  [
    {"steep": 100.0},
    {"head": {"a": ROWS, "b": 0 * ROWS}},
    {"mean": 5.0},
  ],
  ids=["steeper logits", "rows that differ", "batch statistics"],
)
def test_a_false_claim_about_a_trunk_is_refused(wrong):
  model, batch = _model(**wrong), _batch()
  with pytest.raises(ValueError, match="geometry does not explain the logits"):
    rmm.certify(model, {}, batch)
  found = jax.jit(lambda batch: rmm.certify(model, {}, batch))(batch)
  assert not np.any(found.radius)
  assert not np.any(found.covers({"a": 0.0}))


def test_a_chain_does_not_reach_through_a_trunk():
  """The stated matrices end before the trunk turns what they give."""
  chain = {m: (jnp.diag(jnp.array([0.01, 0.005])),) for m in ("a", "b")}
  plain = rmm.certify(_model(turn=True), {}, _batch())
  chained = rmm.certify(_model(turn=True, chain=chain), {}, _batch())
  np.testing.assert_array_equal(plain.radius, chained.radius)


def test_bounded_encoders_do_not_stand_in_for_constants_behind_a_trunk():
  part = encoders.bounded(
    encoders.transformer(width=8, num_layers=1, num_heads=2, embedding_dim=6),
    radius=1.0,
  )
  model = rmm.models.trunk_fusion(
    {"a": part, "b": part},
    3,
    input_shapes={"a": (4, 2), "b": (4, 2)},
    width=8,
    embedding_dim=6,
  )
  params, _ = model.init(jax.random.key(0))
  inputs = {m: jnp.ones((2, 4, 2)) for m in ("a", "b")}
  with pytest.raises(ValueError, match="states no Lipschitz bound"):
    rmm.certify(model, params, {"inputs": inputs})


def test_the_published_form_is_refused_for_a_trunk():
  with pytest.raises(ValueError, match="fidelity must be 'corrected'"):
    rmm.certify(_model(), {}, _batch(), fidelity="published")


@pytest.mark.parametrize("fusion", ["additive", "joint"])
def test_budgets_of_a_loss_are_refused_by_name(fusion):
  logits = jnp.array([[2.0, 1.0, 0.0]])
  sensitivity = {"a": jnp.ones((1, 3))}
  for budgets in ({"up": 1.0}, {}):
    with pytest.raises(ValueError, match="budgets"):
      losses.certified_radius(
        logits,
        sensitivity,
        jnp.array([0]),
        r0=1.0,
        temperature=0.1,
        budgets=budgets,
        fusion=fusion,
      )


@pytest.mark.parametrize("scale", [1e10, 1e19, 1e20, 1e25])
def test_a_neuron_whose_slope_overflows_is_not_a_dead_one(scale):
  """Steep behind a threshold: off at -0.1, and on just above 0."""
  steep = jnp.diag(jnp.array([scale, 1.0]))

  def fn(steep, inputs):
    hidden = jnp.maximum(jnp.matmul(inputs["x"], steep, precision="highest"), 0)
    shift = jnp.array([[-1.0, 0.0]]) * steep[0, 0]
    hidden = jnp.matmul(hidden, steep, precision="highest") + shift
    return jnp.maximum(hidden, 0)[:, ::-1]

  model = rmm.models.from_function(
    fn, steep, num_classes=2, input_shapes={"x": (2,)}
  )
  x = jnp.array([[-0.1, 1.0]])
  found = rmm.certify(model, steep, {"inputs": {"x": x}}, source="relaxation")
  assert int(found.prediction[0]) == 0
  # relu(s relu(s x) - s) in exact arithmetic, at a distance of 0.15.
  turned = max(scale * (scale * 0.05) - scale, 0.0)
  assert turned > 1.0
  assert found.radius[0] <= 0.15
  assert found.radius[0] > (0.05 if scale < 1e20 else -np.inf)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e5])
def test_rows_that_cancel_an_offset_are_no_batch_statistics(offset):
  """Mean subtraction over the features of an example is its own affair."""
  keys = jax.random.split(jax.random.key(1), 3)
  weights = (
    jax.random.normal(keys[0], (16, 12)) / 4,
    jax.random.normal(keys[1], (12, 3)) / 3,
  )

  def fn(weights, inputs):
    x = inputs["x"] - jnp.mean(inputs["x"], axis=-1, keepdims=True)
    hidden = jnp.maximum(jnp.matmul(x, weights[0], precision="highest"), 0)
    return jnp.matmul(hidden, weights[1], precision="highest")

  model = rmm.models.from_function(
    fn, weights, num_classes=3, input_shapes={"x": (16,)}
  )
  x = offset + jax.random.normal(keys[2], (33, 16))
  found = rmm.certify(model, weights, {"inputs": {"x": x}}, source="relaxation")
  if offset < 1e5:
    assert np.mean(np.asarray(found.radius) > 0) > 0.8


def test_unsound_tables_are_not_mixed_with_balls():
  part = encoders.mlp(hidden_sizes=(6,), embedding_dim=4)
  model = rmm.models.concat_fusion(
    {"a": part, "b": part}, 3, input_shapes={"a": (2,), "b": (2,)}
  )
  params, _ = model.init(jax.random.key(0))
  tables = rmm.certification.empirical_tables(
    model,
    params,
    {**_batch(), "present": {m: jnp.ones(6, bool) for m in ("a", "b")}},
  )
  found = rmm.certify(model, params, _batch(), source="local", tables=tables)
  assert found.sound
  wide = dataclasses.replace(
    rmm.certification.sensitivity_tables(model, params), source="global"
  )
  again = rmm.certify(model, params, _batch(), source="local", tables=wide)
  np.testing.assert_allclose(found.radius, again.radius, rtol=1e-5)
