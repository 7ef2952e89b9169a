"""Edge cases of a certificate: ties, nothing to attack, bad values."""

import certification_heads as heads
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robust_mm as rmm
from robust_mm import certification
from robust_mm import models
from robust_mm.models import encoders

# Without the type checks of these tests, as users call it.
COVERS = certification.Certificate.covers.__wrapped__


def test_ties_have_radius_zero_and_cover_nothing():
  found = heads.plain({"a": [[1.0, 1.0, 0.0]]}, {"a": heads.HOLLOW})
  assert found.radius[0] == 0
  assert found.modality_radius["a"][0] == 0
  assert not found.covers({})[0]


def test_nothing_to_attack_is_infinite():
  found = heads.plain({"a": [[2.0, 1.0, 0.0]]}, {"a": 0 * heads.HOLLOW})
  assert found.radius[0] == np.inf
  assert found.covers({"a": np.inf})[0]
  assert found.vulnerability["a"][0] == 0


def test_nothing_present_is_infinite_and_invalid():
  for bias in ([0.0, 0.0, 0.0], [0.0, 2.0, 1.0]):
    found = heads.plain(
      {"a": [[2.0, 1.0, 0.0]]},
      {"a": heads.HOLLOW},
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
  terms, table = np.array([[2.0, 1.0, 0.0]]), heads.HOLLOW.copy()
  if where == "logits":
    terms[0, 1] = bad
  else:
    table[0, 1] = bad
  found = heads.plain(
    {"a": terms, "b": [[1.0, 0.0, 0.0]]}, {"a": table, "b": heads.HOLLOW}
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
  found = heads.plain(
    {"a": [[size, -size, 0.0]], "b": [[size, 0.0, -size]]},
    {"a": heads.HOLLOW, "b": heads.HOLLOW},
  )
  for leaf in jax.tree.leaves(found):
    assert not np.any(np.isnan(np.asarray(leaf, float)))
  for removed in (["a"], ["a", "b"]):
    assert not np.isnan(found.radius_without(removed)[0])
  assert not np.any(np.isnan(found.frontier("a", "b", jnp.array([0.0, 1.0]))))


@pytest.mark.parametrize(
  "call, match",
  [
    (lambda c: c.covers({"nose": 1.0}), "budgets names the unknown"),
    (lambda c: c.covers({"a": -1.0}), "budgets"),
    (lambda c: c.covers({"a": float("nan")}), "budgets"),
    (lambda c: c.covers({}, max_missing=2), "max_missing"),
    (lambda c: c.covers({}, max_missing=-1), "max_missing"),
    (
      lambda c: COVERS(c, {}, max_missing=1.0),
      "max_missing must be an integer",
    ),
    (lambda c: COVERS(c, 0.5), "budgets must map modalities .*; got 0.5"),
    (lambda c: c.covers({"a": "0.1"}), r"budgets\['a'\] must be a number"),
    (lambda c: c.covers({"a": np.ones(3)}), r"budgets\['a'\] .* shape \(3,\)"),
    (lambda c: c.radius_without(["nose"]), "removed names the unknown"),
    (lambda c: c.joint_radius("l3"), "ball"),
    (lambda c: c.frontier("a", "nose", jnp.zeros(2)), "frontier"),
    (lambda c: c.frontier("a", "a", jnp.zeros(2)), "second must be another"),
  ],
)
def test_bad_questions_are_refused_by_name(call, match):
  found = heads.plain({"a": [[2.0, 1.0, 0.0]]}, {"a": heads.HOLLOW})
  with pytest.raises(ValueError, match=match):
    call(found)


@pytest.mark.parametrize(
  "kwargs, match",
  [
    ({"units": {"a": 0.0}}, "units"),
    ({"units": {"nose": 1.0}}, "units"),
    ({"norm": "l7"}, "^norm must be one of 'l2', 'linf', 'l1'; got 'l7'"),
    ({"norm": 3}, "^norm must be one of .*; got 3"),
    ({"norm": True}, "^norm must be one of"),
    ({"norm": {"a": 7}}, r"^norm\['a'\] must be one of"),
    ({"norm": "linf"}, "sizes"),
    ({"fidelity": "rough"}, "fidelity"),
    ({"fusion": "late"}, "fusion"),
    ({"slack": certification.Slack(margin=-1.0)}, "slack"),
    ({"logits": jnp.zeros((1, 3), jnp.bfloat16)}, "bfloat16"),
  ],
)
def test_bad_settings_are_refused_by_name(kwargs, match):
  with pytest.raises(ValueError, match=match):
    heads.plain({"a": [[2.0, 1.0, 0.0]]}, {"a": heads.HOLLOW}, **kwargs)


def test_relative_units_by_name_point_to_the_helper():
  with pytest.raises(ValueError, match="relative_units"):
    heads.plain({"a": [[2.0, 1.0, 0.0]]}, {"a": heads.HOLLOW}, units="relative")


def _certificates():
  """One of every kind of certified set."""
  logits = jnp.array([[3.0, 1.0, 0.0]])
  yield heads.plain(
    {"a": [[2.0, 1.0, 0.0]], "b": [[1.0, 0.0, 0.0]]},
    {"a": heads.HOLLOW, "b": heads.HOLLOW},
  )
  tables = certification.SensitivityTables(
    tables={"a": heads.HOLLOW, "b": heads.HOLLOW}, source="global", sound=True
  )
  yield certification.margin_certificate(
    None, tables, logits=logits, fusion="joint"
  )
  model = models.from_function(
    lambda w, inputs: inputs["a"] @ w + inputs["b"] @ w,
    jnp.eye(3),
    num_classes=3,
    input_shapes={"a": (3,), "b": (3,)},
  )
  batch = {"inputs": {"a": logits, "b": jnp.zeros((1, 3))}}
  yield rmm.certify(model, jnp.eye(3), batch, source="relaxation")


@pytest.mark.parametrize("bad", [-1.0, -1e-6, np.nan, -np.inf])
def test_sizes_below_nothing_are_refused_and_never_covered(bad):
  """A negative budget of one modality must buy nothing for another."""
  for found in _certificates():
    assert found.covers({"a": 0.1, "b": 0.1})[0]
    for budgets in ({"a": bad}, {"a": 0.1, "b": bad}):
      with pytest.raises(ValueError, match="must be non-negative"):
        found.covers(budgets)
      assert not jax.jit(found.covers)(budgets)[0]
    grid = jnp.array([0.0, 0.1, bad])
    with pytest.raises(ValueError, match="grid must be non-negative"):
      found.frontier("a", "b", grid)
    reach = jax.jit(lambda g, found=found: found.frontier("a", "b", g))(grid)[0]
    assert reach[0] >= reach[1] > 0
    assert reach[2] == 0
    with pytest.raises(ValueError, match="radius must be non-negative"):
      certification.certified_accuracy(found, jnp.array([0]), bad)


@pytest.mark.parametrize("source", ["global", "local", "relaxation", "best"])
def test_one_class_is_refused(source):
  model = rmm.Model(
    modalities=("a",),
    num_classes=1,
    init=lambda key: ({}, {}),
    encode=lambda params, state, inputs, present, *, train, key=None: (
      inputs,
      state,
    ),
    fuse=lambda params, embeddings, present: rmm.Outputs(
      logits=embeddings["a"][:, :1],
      scores={"a": embeddings["a"][:, :1]},
      embeddings=embeddings,
    ),
    geometry=lambda params: rmm.Geometry(
      head={"a": jnp.eye(1, 3)}, bias=jnp.zeros(1), lipschitz={"a": 1.0}
    ),
  )
  batch = {"inputs": {"a": jnp.ones((2, 3))}}
  with pytest.raises(ValueError, match="two classes"):
    rmm.certify(model, {}, batch, source=source)


@pytest.mark.parametrize("source", ["global", "local", "relaxation", "best"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_input_that_is_no_number_is_never_certified(source, bad):
  """Not even by encoders that swallow it: max(nan, 0) may be 0."""
  options = {"hidden_sizes": (6,), "embedding_dim": 4}
  model = models.late_fusion(
    {
      "a": encoders.mlp(**options),
      "b": encoders.bounded(encoders.mlp(**options), radius=2.0),
    },
    num_classes=3,
    input_shapes={"a": (5,), "b": (5,)},
  )
  params, state = model.init(jax.random.key(0))
  x = jax.random.normal(jax.random.key(1), (2, 3, 5))
  if source in ("local", "relaxation"):  # a projection has no relaxation
    model = models.concat_fusion(
      {"a": encoders.mlp(**options), "b": encoders.mlp(**options)},
      num_classes=3,
      input_shapes={"a": (5,), "b": (5,)},
    )
    params, state = model.init(jax.random.key(0))
  for name, other in (("a", "b"), ("b", "a")):
    inputs = {name: x[0].at[1, 2].set(bad), other: x[1]}
    found = rmm.certify(
      model, params, {"inputs": inputs}, state=state, source=source
    )
    assert found.radius[1] == 0
    assert found.modality_radius[name][1] == 0
    assert not found.covers({name: 0.0})[1]
    assert np.all(np.asarray(found.radius)[[0, 2]] > 0)
    finite = jax.tree.map(lambda leaf: not np.any(np.isnan(leaf)), found)
    assert all(jax.tree.leaves(finite))
