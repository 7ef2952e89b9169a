"""The masking report: honest models pass, each way of hiding is named."""

import dataclasses

import evaluation_models as toy
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_mm import attacks
from robust_mm import evaluation
from robust_mm.attacks import base
from robust_mm.evaluation import batches
from robust_mm.evaluation import forwards
from robust_mm.evaluation import probes
from robust_mm.evaluation import thorough

RADIUS = 0.4
CHECKS = {
  "reaches_chance",
  "falls_with_radius",
  "many_steps_beat_one",
  "gradients_beat_queries",
  "attack_beats_noise",
  "margin_ignores_scale",
  "cross_entropy_unsaturated",
}


def _changed(*, inputs=lambda x: x, logits=lambda z: z):
  """The linear model, its inputs or its logits passed through a function."""
  model = toy.linear_model()

  def encode(params, state, given, present, **options):
    given = {m: inputs(x) for m, x in given.items()}
    return model.encode(params, state, given, present, **options)

  def fuse(params, embeddings, present):
    outputs = model.fuse(params, embeddings, present)
    return dataclasses.replace(outputs, logits=logits(outputs.logits))

  return dataclasses.replace(model, encode=encode, fuse=fuse, geometry=None)


def _rounded(x):
  return jnp.round(32 * x) / 32


def _report(model, **arguments):
  params, _ = model.init(jax.random.key(0))
  arguments = {"radius": RADIUS, **arguments}
  return evaluation.masking_report(
    model, params, toy.make_batch(60), **arguments
  )


def _failed(found):
  return {check["name"] for check in found["checks"] if not check["passed"]}


@pytest.mark.parametrize("norm", [2, "inf"])
def test_an_honest_model_passes_every_check(norm):
  found = _report(toy.linear_model(), norm=norm, radius=0.3)
  assert {check["name"] for check in found["checks"]} == CHECKS
  assert not _failed(found)
  assert found["passed"]
  # And the attack is the closed form: nothing is left out.
  params, _ = toy.linear_model().init(jax.random.key(0))
  batch = toy.make_batch(60)
  exact = toy.exact_radii if norm == 2 else toy.exact_linf_radii
  right = toy.logits(params, batch["inputs"]).argmax(-1) == batch["label"]
  robust = right & (exact(params, batch["inputs"]) > 0.3)
  assert found["accuracy"]["white box"] == pytest.approx(robust.mean())
  assert found["accuracy"]["clean"] == pytest.approx(right.mean())


def test_rounded_inputs_are_named():
  """No slope anywhere: PGD wanders, random search does not care."""
  found = _report(_changed(inputs=_rounded))
  assert "gradients_beat_queries" in _failed(found)
  assert not found["passed"]


def test_large_logits_are_named_on_the_cross_entropy_only():
  model = _changed(logits=lambda z: 1e4 * z)
  found = _report(model, loss="cross_entropy")
  assert "cross_entropy_unsaturated" in _failed(found)
  assert "margin_ignores_scale" not in _failed(found)
  margin = _report(model, loss="margin")
  assert _failed(margin) == {"cross_entropy_unsaturated"}
  honest = _report(toy.linear_model(), loss="cross_entropy")
  assert "cross_entropy_unsaturated" not in _failed(honest)


def test_a_gradient_that_points_the_wrong_way_is_named():
  def flipped(x):
    return x + 2 * (jax.lax.stop_gradient(x) - x)

  failed = _failed(_report(_changed(inputs=flipped)))
  assert {"reaches_chance", "gradients_beat_queries"} <= failed


def test_copies_are_the_nearest_examples_of_another_label():
  model = toy.linear_model()
  params, state = model.init(jax.random.key(0))
  batch = toy.without(toy.make_batch(30), [])
  batch["present"]["left"][::4] = False
  data = batches.host_data(model, batch)
  device = batches.Device(params, state)
  units = {"left": 2.0, "right": 0.5}
  probe = probes.Probe(
    model,
    forwards.Forward(model, device, size=30),
    device,
    data,
    norm=2,
    units=units,
    valid_range=None,
    key=jax.random.key(0),
  )
  radius, left = probe.copied()
  label, present = batch["label"], batch["present"]
  reaches, robust = [], []
  for i in range(30):
    names = [m for m in toy.DIMS if present[m][i]]
    own = {m: x[i : i + 1] for m, x in batch["inputs"].items()}
    apart = {
      j: np.sqrt(
        sum(
          np.sum(((x[i] - x[j]) / units[m]) ** 2)
          for m, x in batch["inputs"].items()
          if m in names
        )
      )
      for j in range(30)
      if label[j] != label[i] and all(present[m][j] for m in names)
    }
    nearest = min(apart, key=apart.get)
    other = {m: x[nearest : nearest + 1] for m, x in batch["inputs"].items()}
    kept = [
      toy.logits(params, x, names).argmax() == label[i] for x in (own, other)
    ]
    robust.append(all(kept))
    if not all(kept):
      reaches.append(apart[nearest])
  assert left == pytest.approx(np.mean(robust))
  assert radius == pytest.approx(max(reaches), rel=1e-6)


def test_noise_has_its_size_and_keeps_the_range():
  seen = []
  model = toy.linear_model()
  params, state = model.init(jax.random.key(0))
  data = batches.host_data(model, toy.make_batch(20))
  device = batches.Device(params, state)

  class Watched(forwards.Forward):
    def __call__(self, data, rows, subset):
      seen.append(data.inputs)
      return super().__call__(data, rows, subset)

  for norm in (2, np.inf):
    probe = probes.Probe(
      model,
      Watched(model, device, size=20),
      device,
      data,
      norm=norm,
      units={"left": 2.0, "right": 0.5},
      valid_range={"right": (-0.2, 0.2)} if norm == 2 else None,
      key=jax.random.key(1),
    )
    seen.clear()
    probe.left_by_noise(0.7, num_draws=1)
    (moved,) = seen
    change = {m: moved[m] - data.inputs[m] for m in toy.DIMS}
    if norm == 2:
      grown = np.abs(moved["right"]) > np.maximum(
        0.2, np.abs(data.inputs["right"])
      )
      assert not grown.any()
      size = np.sqrt(
        np.sum((change["left"] / 2.0) ** 2, 1)
        + np.sum((change["right"] / 0.5) ** 2, 1)
      )
      assert np.all(size <= 0.7 * (1 + 1e-6))
      assert size.max() > 0.6
    else:
      np.testing.assert_allclose(np.abs(change["left"]), 1.4, rtol=1e-5)
      np.testing.assert_allclose(np.abs(change["right"]), 0.35, rtol=1e-5)


THOROUGH = {
  "more_effort_finds_no_more",
  "no_objective_is_stronger",
  "white_box_beats_transfer",
}


def _surrogate():
  model = toy.linear_model()
  return evaluation.Surrogate(
    model=model, params=model.init(jax.random.key(0))[0]
  )


def test_an_honest_model_passes_the_costly_checks_as_well():
  found = _report(
    toy.linear_model(), radius=0.3, thorough=True, surrogate=_surrogate()
  )
  assert {check["name"] for check in found["checks"]} == CHECKS | THOROUGH
  assert found["passed"], _failed(found)
  white = found["accuracy"]["white box"]
  # Of a linear model every effort and every objective is exact but the ones
  # that follow a sum of classes; points made for itself are its own.
  assert found["objectives"]["margin of every class"] == pytest.approx(white)
  assert found["transfer"] == pytest.approx(white, abs=0.02)
  last = found["effort"][-1]
  assert last[:2] == [50, 20]
  assert last[2] == pytest.approx(white)
  # Statistics against the closed form of a linear model.
  params, _ = toy.linear_model().init(jax.random.key(0))
  batch = toy.make_batch(60)
  logits = np.asarray(toy.logits(params, batch["inputs"]), np.float64)
  own = logits[np.arange(60), batch["label"]]
  rival = np.where(
    np.arange(logits.shape[1]) == batch["label"][:, None], -np.inf, logits
  ).max(axis=1)
  stated = found["statistics"]["model"]
  np.testing.assert_allclose(
    stated["margin"], np.quantile(own - rival, stated["quantiles"]), rtol=1e-4
  )
  np.testing.assert_allclose(
    stated["logit_norm"],
    np.quantile(np.linalg.norm(logits, axis=1), stated["quantiles"]),
    rtol=1e-4,
  )
  assert found["statistics"]["surrogate"] == stated


def test_points_made_for_another_model_unmask_rounded_inputs():
  """No slope to follow, but the honest twin has the same weak directions."""
  found = _report(
    _changed(inputs=_rounded), thorough=True, surrogate=_surrogate()
  )
  assert "white_box_beats_transfer" in _failed(found)
  assert found["transfer"] < found["accuracy"]["white box"] - 0.1
  assert max(found["statistics"]["model"]["gradient_norm"]) == 0


def test_a_stronger_objective_and_unfinished_efforts_are_named():
  """Logits so large that the cross-entropy has no slope left."""
  found = _report(
    _changed(logits=lambda z: 1e4 * z), loss="cross_entropy", thorough=True
  )
  assert "no_objective_is_stronger" in _failed(found)
  assert "transfer" not in found

  class Slow(probes.Probe):
    num_classes = 3

    def __init__(self):
      pass

    def left(self, radius, **given):
      return 1 - given["num_steps"] / 400 if "num_restarts" in given else 0.5

  model = toy.linear_model()
  params, _ = model.init(jax.random.key(0))
  data = batches.host_data(model, toy.make_batch(20))
  _, checks = thorough.measure(
    Slow(),
    data,
    batches.Device(params, {}),
    model,
    loss="margin",
    radius=0.3,
    white=0.5,
    least=0.02,
    surrogate=None,
  )
  assert {name: passed for name, passed, _ in checks} == {
    "more_effort_finds_no_more": False,
    "no_objective_is_stronger": True,
  }


@pytest.mark.parametrize(
  "change", [{"modalities": ("left",)}, {"num_classes": 2}], ids=str
)
def test_a_surrogate_of_another_task_is_refused(change):
  """Its points would be no attack, and the check would pass for nothing."""
  other = _surrogate()
  model = dataclasses.replace(other.model, **change)
  other = dataclasses.replace(other, model=model)
  with pytest.raises(
    ValueError, match=f"surrogate must have the {next(iter(change))}"
  ):
    _report(toy.linear_model(), thorough=True, surrogate=other)


def test_a_surrogate_of_other_input_shapes_is_refused():
  """Where both models state them; of another one nothing is known."""
  shapes = {"left": (4,), "right": (3,)}

  def having(found):
    return dataclasses.replace(toy.linear_model(), input_shapes=found)

  def checked(mine, other):
    other = dataclasses.replace(_surrogate(), model=having(other))
    thorough.check_surrogate(having(mine), other)

  checked(shapes, dict(reversed(shapes.items())))
  checked(shapes, None)
  checked(None, shapes)
  message = r"the model, \(3,\), for 'right'; got \(5,\)\."
  with pytest.raises(ValueError, match=message):
    checked(shapes, {**shapes, "right": (5,)})


def test_surrogate_goes_with_thorough():
  with pytest.raises(ValueError, match="surrogate goes with thorough=True"):
    _report(toy.linear_model(), surrogate=_surrogate())
  model = toy.linear_model()
  params, _ = model.init(jax.random.key(0))
  for given in ({}, {"masking_thorough": True, "attack": None}):
    with pytest.raises(ValueError, match="surrogate needs a protocol with"):
      evaluation.evaluate(
        model,
        params,
        toy.make_batch(20),
        protocol=evaluation.standard(radii=(RADIUS,), **given),
        surrogate=_surrogate(),
      )


def _evaluated(model, **options):
  params, state = model.init(jax.random.key(0))
  attack = {"name": "pgd", "num_steps": 5, "num_restarts": 1, **options}
  protocol = evaluation.standard(
    radii=(RADIUS,), modality_radii=(), attack=attack, tightness=()
  )
  return evaluation.evaluate(
    model, params, toy.make_batch(60), state=state, protocol=protocol
  )


def test_every_report_has_the_line(tmp_path):
  report = _evaluated(toy.linear_model())
  check = report.results["checks"][-1]
  assert check["name"] == "gradients_do_not_mislead"
  assert check["passed"]
  assert report.results["masking"]["radius"] == RADIUS
  assert report.results["timing"]["masking_seconds"] > 0
  report.save(tmp_path)
  page = (tmp_path / "report.html").read_text()
  assert "No sign that gradients mislead the attacks" in page
  assert "gradients beat queries" in page


def test_a_report_says_when_gradients_mislead():
  report = _evaluated(_changed(inputs=_rounded))
  check = report.results["checks"][-1]
  assert not check["passed"]
  assert not check["required"]
  assert "random search" in check["message"]
  saturated = _evaluated(
    _changed(logits=lambda z: 1e4 * z), loss="cross_entropy"
  )
  assert "cross-entropy" in saturated.results["checks"][-1]["message"]


@pytest.mark.parametrize(
  "arguments, message",
  [
    ({"radius": 0.0}, "radius must be positive"),
    ({"norm": 3}, "norm must be one of"),
    ({"loss": "hinge"}, "loss must be one of"),
    ({"max_examples": 0}, "max_examples must be an integer of at least 1"),
    ({"units": "relative"}, "units must map modalities to sizes"),
    ({"units": {"up": 1.0}}, "unknown modality 'up'"),
  ],
)
def test_bad_arguments_are_refused_by_name(arguments, message):
  with pytest.raises(ValueError, match=message):
    _report(toy.linear_model(), **arguments)


# ---- restrained_softmax.md 14.11 and 14.12


def _nearest(params, batch, norm):
  """The exact distance of every example to its nearest wrong class."""
  exact = toy.exact_radii if norm == 2 else toy.exact_linf_radii
  return exact(params, batch["inputs"])


@pytest.mark.parametrize("norm", [2, "linf"])
@pytest.mark.parametrize("targets", ["rivals", "adaptive"])
def test_aimed_pgd_reaches_the_boundary_of_a_linear_model(norm, targets):
  """Broken at 1.001 of the exact distance, and never at 0.999 of it."""
  model, batch = toy.linear_model(), toy.make_batch(40)
  params, state = model.init(jax.random.key(0))
  logits_fn = attacks.logits_fn(model, params, state, batch["present"])
  label = jnp.argmax(logits_fn(batch["inputs"]), axis=-1)
  distance = _nearest(params, batch, 2 if norm == 2 else "linf")
  attack = attacks.pgd(
    norm=norm, budget=1.0, num_steps=50, num_restarts=3, targets=targets
  )
  survives = jax.jit(
    lambda budget: attacks.survives(
      jax.random.key(0),
      attack,
      logits_fn,
      batch["inputs"],
      label,
      budget=budget,
    )
  )
  assert not np.any(survives(jnp.asarray(1.001 * distance, jnp.float32)))
  assert np.all(survives(jnp.asarray(0.999 * distance, jnp.float32)))


def test_adaptive_targets_are_the_best_and_the_nearest_class():
  """Three rivals: the best one is far away, the nearest has a steep row."""
  weight = np.array([[0.0, 0], [1, 0], [0, 50.0], [-1, -1]])
  bias = np.array([3.0, 2.0, 0.0, -5.0])

  def logits_fn(inputs):
    rows = inputs["x"] @ jnp.asarray(weight.T, jnp.float32)
    return rows + jnp.asarray(bias, jnp.float32)[None]

  inputs = {"x": jnp.zeros((2, 2))}
  label = jnp.zeros(2, int)
  seen = []
  real = base.Objective.nearest

  def spy(self, number):
    seen.append(np.asarray(real(self, number)))
    return real(self, number)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(base.Objective, "nearest", spy)
    attack = attacks.pgd(
      norm=2, budget=0.1, num_restarts=4, num_steps=10, targets="adaptive"
    )
    moved = attack(jax.random.key(0), logits_fn, inputs, label)
  # Distances of 1 (by slope 1), 3 / 50 and 8 / sqrt(2).
  assert seen[0].tolist() == [[2, 2], [1, 1], [3, 3]]
  assert np.all(np.argmax(logits_fn(moved), axis=-1) == 2)
  plain = attacks.pgd(
    norm=2, budget=0.1, num_restarts=2, num_steps=10, random_start=False
  )
  # Raising the best wrong class alone, as one without a first look does.
  one = attacks.pgd(norm=2, budget=0.1, num_steps=10, targets="adaptive",
                    num_restarts=1)  # fmt: skip
  moved = one(jax.random.key(0), logits_fn, inputs, label)
  assert np.all(np.argmax(logits_fn(moved), axis=-1) == 0)
  assert plain.settings["targets"] == "rivals"


@pytest.mark.parametrize(
  "norm, dual", [(2, 2), ("linf", 1)], ids=("l2", "linf")
)
def test_the_nearest_class_is_so_in_the_ball_and_its_units(norm, dual):
  """Of a linear model the distance is a quotient, whatever the units."""
  rng = np.random.default_rng(3)
  units = {"x": 0.1, "y": 4.0}
  rows = {m: rng.normal(size=(5, 3)) for m in units}
  bias = np.array([4.0, 1.0, 0.0, -1.0, 0.5])

  def logits_fn(inputs):
    said = sum(inputs[m] @ jnp.asarray(rows[m].T, jnp.float32) for m in rows)
    return said + jnp.asarray(bias, jnp.float32)[None]

  inputs = {m: jnp.zeros((1, 3)) for m in rows}
  seen, real = [], base.Objective.nearest

  def spy(self, number):
    seen.append(np.asarray(real(self, number))[:, 0].tolist())
    return real(self, number)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(base.Objective, "nearest", spy)
    attacks.pgd(
      norm=norm, budget=0.1, num_restarts=5, num_steps=1, targets="adaptive",
      units=units,
    )(jax.random.key(0), logits_fn, inputs, jnp.zeros(1, int))  # fmt: skip

  def order(units, dual):
    slope = np.concatenate(
      [units[m] * (rows[m][1:] - rows[m][0]) for m in rows], axis=1
    )
    distance = (bias[0] - bias[1:]) / np.linalg.norm(slope, dual, axis=1)
    return (1 + np.argsort(distance)).tolist()

  assert seen[0] == order(units, dual)
  assert seen[0] != order(dict.fromkeys(units, 1.0), dual)


def test_rounded_logits_fail_against_transfer_and_queries():
  """No gradient at all: PGD wanders, others do not need one."""
  found = _report(
    _changed(
      logits=lambda z: jnp.round(4 * z) / 4 + 1e-3 * jnp.arange(3)[None]
    ),
    thorough=True,
    surrogate=_surrogate(),
  )
  assert {"gradients_beat_queries", "white_box_beats_transfer"} <= _failed(
    found
  )
  # The worst case is no better than the best attack of all.
  shares = [*found["objectives"].values(), found["transfer"]]
  shares += [found["accuracy"][name] for name in ("white box", "queries")]
  assert found["worst_case"] <= min(shares) + 1e-9
  assert found["worst_case"] < found["accuracy"]["white box"] - 0.05


def test_logits_times_a_thousand_saturate_cross_entropy_alone():
  model = _changed(logits=lambda z: 1000 * z)
  found = _report(model, loss="cross_entropy")
  failed = _failed(found)
  assert "cross_entropy_unsaturated" in failed
  assert "margin_ignores_scale" not in failed
