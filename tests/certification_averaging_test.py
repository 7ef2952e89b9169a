"""Heads that average over present modalities: subsets by brute force."""

import itertools

import certification_heads as heads
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

import robust_mm as rmm
from robust_mm import certification
from robust_mm import losses
from robust_mm import models
from robust_mm.models import encoders

BUDGETS = {"audio": 0.05, "image": 0.1, "text": 0.02}


def _averaging(seed, batch=300, absent=0.0, spread=0.3, **kwargs):
  """Identity encoders, a mean over present modalities, a bias that matters."""
  rows, bias = heads.head(seed)
  bias = bias * spread / 0.1
  rng = np.random.default_rng(seed + 1)
  inputs = {m: rng.normal(size=(batch, w.shape[1])) for m, w in rows.items()}
  present = {m: rng.random(batch) >= absent for m in rows}
  stated = heads.geometry(rows, bias, reduction="mean")
  terms = {m: jnp.asarray(inputs[m] @ rows[m].T, jnp.float32) for m in rows}
  kwargs = {"slack": heads.NO_SLACK, "bias": stated.bias, **kwargs}
  found = certification.margin_certificate(
    terms, heads.tables(stated), present, reduction="mean", **kwargs
  )
  return inputs, rows, bias, present, found


def _brute(inputs, rows, bias, present, removed, budgets):
  """Logits and costs to every class once ``removed`` are gone."""
  here = {m: present[m] & (m not in removed) for m in rows}
  number = np.maximum(sum(h.astype(int) for h in here.values()), 1)
  total = sum(
    np.where(here[m][:, None], inputs[m] @ rows[m].T, 0) for m in rows
  )
  logits = total / number[:, None] + bias

  def cost(y):
    return (
      sum(
        np.where(here[m], budgets.get(m, 0.0), 0)[:, None]
        * np.linalg.norm(rows[m][y][:, None] - rows[m][None], axis=-1)
        for m in rows
      )
      / number[:, None]
    )

  return logits, cost


def _least(logits, cost, y):
  index = np.arange(len(y))
  margin = logits[index, y][:, None] - logits - cost(y)
  margin[index, y] = np.inf
  return margin


@pytest.mark.parametrize("absent", [0.0, 0.3])
@pytest.mark.parametrize("missing", [0, 1, 2, 3])
def test_removal_from_a_mean_equals_brute_force_over_subsets(missing, absent):
  inputs, rows, bias, present, found = _averaging(0, absent=absent)
  y = np.asarray(found.prediction)
  worst = np.full(300, np.inf)
  for count in range(missing + 1):
    for removed in itertools.combinations(heads.NAMES, count):
      logits, cost = _brute(inputs, rows, bias, present, removed, BUDGETS)
      worst = np.minimum(worst, _least(logits, cost, y).min(-1))
  valid = np.asarray(found.valid)
  clear = (np.abs(worst) > 1e-5) & valid
  ask = jax.jit(lambda c: c.covers(BUDGETS, max_missing=missing))
  covered = np.asarray(ask(found))
  np.testing.assert_array_equal(covered[clear], worst[clear] > 0)
  assert covered[clear].sum() > 0
  assert not np.all(covered[clear])
  # The rule of a sum is another one: it would have been wrong here.
  if missing in (1, 2) and not absent:
    as_sum = certification.margin_certificate(
      found.contributions,
      certification.SensitivityTables(
        tables={
          m: t / 3
          for m, t in heads.tables(heads.geometry(rows, bias)).tables.items()
        },
        source="global",
        sound=True,
      ),
      bias=jnp.asarray(bias, jnp.float32),
      slack=heads.NO_SLACK,
    )
    np.testing.assert_allclose(
      as_sum.radius, found.radius, rtol=1e-4, atol=1e-5
    )
    differs = np.asarray(as_sum.covers(BUDGETS, max_missing=missing)) != covered
    assert np.any(differs[clear])


@pytest.mark.parametrize("removed", [["image"], ["audio", "text"]])
def test_radius_without_equals_the_reduced_model(removed):
  inputs, rows, bias, present, found = _averaging(1, absent=0.2)
  y = np.asarray(found.prediction)
  logits, _ = _brute(inputs, rows, bias, present, removed, {})
  kept = [m for m in heads.NAMES if m not in removed]
  here = {m: present[m] for m in kept}
  number = sum(h.astype(int) for h in here.values())
  square = sum(
    here[m][:, None]
    * np.sum((rows[m][y][:, None] - rows[m][None]) ** 2, axis=-1)
    for m in kept
  )
  length = np.sqrt(square) / np.maximum(number, 1)[:, None]
  margin = _least(logits, lambda y: 0.0, y)
  with np.errstate(divide="ignore", invalid="ignore"):
    ratio = np.where(margin > 0, margin / length, 0)
  expected = ratio.min(-1)
  some = number > 0
  radius = np.asarray(found.radius_without(removed))
  np.testing.assert_allclose(radius[some], expected[some], rtol=1e-4, atol=1e-5)
  assert np.any(radius[some] > 0)
  # Nothing left: the bias decides, and there is nothing to attack.
  left = ~some & np.asarray(found.valid)
  assert left.sum() > 0
  stays = np.argmax(bias) == y[left]
  np.testing.assert_array_equal(radius[left], np.where(stays, np.inf, 0))


def test_known_absent_is_the_certificate_of_the_reduced_model():
  _, rows, bias, _, _ = _averaging(2)
  rng = np.random.default_rng(3)
  terms = {m: jnp.asarray(rng.normal(size=(50, 6)), jnp.float32) for m in rows}
  present = {m: np.full(50, m != "image") for m in rows}
  stated = heads.geometry(rows, bias, reduction="mean")
  found = certification.margin_certificate(
    {**terms, "image": jnp.full((50, 6), jnp.nan)},
    heads.tables(stated),
    present,
    bias=stated.bias,
    reduction="mean",
  )
  rest = {m: rows[m] for m in ("audio", "text")}
  reduced = certification.margin_certificate(
    {m: terms[m] for m in rest},
    heads.tables(heads.geometry(rest, bias)),
    bias=stated.bias,
    reduction="mean",
  )
  np.testing.assert_array_equal(found.radius, reduced.radius)
  np.testing.assert_array_equal(
    found.covers({"audio": 0.1}, 1), reduced.covers({"audio": 0.1}, 1)
  )


def test_removal_and_replacement_of_bounded_embeddings_in_a_mean():
  radii = {"image": 0.3}
  inputs, rows, bias, _, _ = _averaging(4)
  inputs = {
    m: x / np.linalg.norm(x, axis=-1, keepdims=True) for m, x in inputs.items()
  }
  inputs["image"] *= 0.3
  stated = heads.geometry(rows, bias, reduction="mean", embedding_radius=radii)
  found = certification.margin_certificate(
    {m: jnp.asarray(inputs[m] @ rows[m].T, jnp.float32) for m in rows},
    certification.tables.global_tables(stated),
    bias=stated.bias,
    reduction="mean",
    slack=heads.NO_SLACK,
  )
  y = np.asarray(found.prediction)
  worst = np.full(300, np.inf)
  for removed in ((), *((m,) for m in heads.NAMES)):
    gone = {*removed, "image"}
    number = 3 - len(removed)
    kept = {m: rows[m] for m in rows if m not in gone}
    total = sum(inputs[m] @ w.T for m, w in kept.items())
    gap = np.linalg.norm(rows["image"][y][:, None] - rows["image"], axis=-1)
    loss = 0 if "image" in removed else 0.3 * gap
    margin = _least(total, lambda y, loss=loss: loss, y) / number
    margin = margin + bias[y][:, None] - bias
    worst = np.minimum(worst, margin.min(-1))
  clear = np.abs(worst) > 1e-5
  covered = np.asarray(found.covers({"image": np.inf}, max_missing=1))
  np.testing.assert_array_equal(covered[clear], worst[clear] > 0)
  assert 0 < covered.sum() < 300


def test_seven_modalities_are_too_many_subsets():
  names = [f"m{i}" for i in range(7)]
  tables = certification.SensitivityTables(
    tables={m: jnp.asarray(heads.HOLLOW) for m in names},
    source="global",
    sound=True,
  )
  terms = {m: jnp.asarray([[2.0, 1.0, 0.0]]) for m in names}
  found = certification.margin_certificate(terms, tables, reduction="mean")
  assert found.covers({"m0": 0.1})[0]
  with pytest.raises(ValueError, match=r"max_missing.*6 modalities, got 7"):
    found.covers({}, max_missing=1)
  as_sum = certification.margin_certificate(terms, tables)
  assert as_sum.covers({}, max_missing=1)[0]


@pytest.mark.parametrize(
  "change", [{"reduction": "median"}, {"fusion": "joint"}]
)
def test_bad_reductions_are_refused_by_name(change):
  _, rows, bias, _, _ = _averaging(5, batch=2)
  settings = {"reduction": "mean", **change}
  with pytest.raises(ValueError, match="reduction must be"):
    certification.margin_certificate(
      {m: jnp.zeros((2, 6)) for m in rows},
      heads.tables(heads.geometry(rows, bias)),
      logits=jnp.zeros((2, 6)),
      **settings,
    )
  for head in (models.ConcatFusion, models.OrthogonalFusion):
    with pytest.raises(ValueError, match="reduction must be"):
      head(6, reduction="median")


@pytest.fixture(scope="module", params=["concat", "orthogonal"])
def model(request):
  options = {"reduction": "mean"}
  if request.param == "orthogonal":
    options["use_bias"] = True
  made = models.build(
    fusion=request.param,
    encoders={
      m: {
        "name": "lipschitz_mlp",
        "width": 8,
        "num_blocks": 0,
        "embedding_dim": 8,
      }
      for m in ("a", "b", "c")
    },
    num_classes=4,
    input_shapes={"a": (5,), "b": (6,), "c": (7,)},
    fusion_options=options,
  )
  params, _ = made.init(jax.random.key(0))
  params["fusion"]["bias"] = jnp.asarray([0.0, 0.2, -0.1, 0.05])
  return made, params


def _batch(size=64, absent=0.3):
  rng = np.random.default_rng(0)
  return {
    "inputs": {
      m: jnp.asarray(rng.normal(size=(size, d)), jnp.float32)
      for m, d in (("a", 5), ("b", 6), ("c", 7))
    },
    "present": {m: jnp.asarray(rng.random(size) >= absent) for m in "abc"},
  }


def test_logits_are_the_mean_over_present_modalities(model):
  made, params = model
  batch = _batch()
  outputs, _ = made.apply(params, {}, batch["inputs"], batch["present"])
  geometry = made.geometry(params)
  assert geometry.reduction == "mean"
  total, number = 0, 0
  for m in "abc":
    here = np.asarray(batch["present"][m])
    term = (
      np.asarray(outputs.embeddings[m], float)
      @ np.asarray(geometry.head[m], float).T
    )
    total = total + here[:, None] * term
    number = number + here
  expected = total / np.maximum(number, 1)[:, None] + np.asarray(geometry.bias)
  np.testing.assert_allclose(outputs.logits, expected, atol=1e-5)


def test_certified_removals_hold_for_the_model_itself(model):
  made, params = model
  batch = _batch()
  found = jax.jit(lambda b: rmm.certify(made, params, b))(batch)
  assert found.reduction == "mean"
  held = np.asarray(found.covers({}, max_missing=1))
  stays = np.ones(64, bool)
  for m in "abc":
    present = {**batch["present"], m: jnp.zeros(64, bool)}
    outputs, _ = made.apply(params, {}, batch["inputs"], present)
    stays &= np.argmax(outputs.logits, -1) == np.asarray(found.prediction)
  valid = np.asarray(found.valid)
  np.testing.assert_array_equal(held[valid], stays[valid])
  assert 0 < held[valid].sum() < valid.sum()
  assert certification.recheck_fp64(made, params, batch, found) == 0


def test_training_sensitivities_and_losses_follow_the_mean(model):
  made, params = model
  batch = _batch()
  geometry = made.geometry(params)
  found = rmm.certify(made, params, batch, slack=heads.NO_SLACK)
  rows = certification.sensitivity(
    geometry, np.asarray(found.prediction), batch["present"]
  )
  for m in "abc":
    assert np.all(rows[m] >= found.sensitivity[m] * (1 - 1e-5) - 1e-6)
    np.testing.assert_allclose(rows[m], found.sensitivity[m], atol=1e-4)
  if geometry.integration is None:
    return
  outputs, _ = made.apply(params, {}, batch["inputs"], batch["present"])
  label = np.asarray(found.prediction)
  expected = losses.certified_radius(
    outputs.logits,
    rows,
    label,
    r0=0.3,
    temperature=0.05,
    present=batch["present"],
  )
  cached = certification.integration_loss(
    geometry.integration,
    outputs.scores,
    label,
    batch["present"],
    geometry.lipschitz,
    r0=0.3,
    temperature=0.05,
    bias=geometry.bias,
    reduction="mean",
  )
  np.testing.assert_allclose(cached, expected, rtol=1e-5)
  as_sum = certification.integration_loss(
    geometry.integration,
    outputs.scores,
    label,
    batch["present"],
    geometry.lipschitz,
    r0=0.3,
    temperature=0.05,
    bias=geometry.bias,
  )
  assert abs(float(as_sum - expected)) > 1e-4


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_subsets_and_caps_work_on_eight_devices(axis_type):
  part = encoders.lipschitz_mlp(width=8, num_blocks=0, embedding_dim=8)
  made = models.concat_fusion(
    {m: encoders.bounded(part, radius=1.0) for m in "abc"},
    4,
    input_shapes={"a": (5,), "b": (6,), "c": (7,)},
    reduction="mean",
  )
  params, _ = made.init(jax.random.key(1))
  batch = _batch()
  budgets = {"a": 0.02, "b": np.inf}

  @jax.jit
  def run(params, batch):
    found = rmm.certify(made, params, batch)
    return found, found.covers(budgets), found.covers({"a": 0.02}, 1)

  found, *answers = run(params, batch)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
  rows = NamedSharding(mesh, PartitionSpec("data"))
  whole = NamedSharding(mesh, PartitionSpec())
  with jax.set_mesh(mesh):
    sharded, *others = run(
      jax.device_put(params, whole), jax.device_put(batch, rows)
    )
  np.testing.assert_allclose(sharded.radius, found.radius, rtol=1e-4, atol=1e-5)
  for one, two in zip(answers, others):
    np.testing.assert_array_equal(one, two)
