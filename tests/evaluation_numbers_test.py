"""evaluate: numbers against closed forms of a linear late-fusion model."""

import dataclasses
import logging

import evaluation_models as toy
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_mm import attacks
from robust_mm import certification
from robust_mm import evaluation
from robust_mm.attacks import balls
from robust_mm.evaluation import batches
from robust_mm.evaluation import forwards
from robust_mm.evaluation import matrix

RADII = (0.2, 0.6)
ATTACK = {"name": "pgd", "loss": "margin", "num_steps": 20, "num_restarts": 2}
# Exact enough for a linear model, deterministic, and quick to compile.
FGM = {"name": "fgm"}
QUIET = {"subsets": False, "attack": None}


def run(model=None, batch=None, **arguments):
  """Evaluates the linear model; keyword arguments of both functions."""
  model = model or toy.linear_model()
  batch = toy.make_batch() if batch is None else batch
  params, state = model.init(jax.random.key(0))
  own = {
    name: arguments.pop(name)
    for name in ("reference", "sharding", "progress", "seed")
    if name in arguments
  }
  arguments = {"radii": RADII, "attack": FGM, **arguments}
  protocol = evaluation.standard(**arguments)
  report = evaluation.evaluate(
    model, params, batch, state=state, protocol=protocol, **own
  )
  return report, params, batch


def pick(results, kind, radius, names):
  """The accuracy of one entry."""
  found = [
    row["accuracy"]
    for row in results[kind]
    if row["radius"] == radius and sorted(row["modalities"]) == sorted(names)
  ]
  assert len(found) == 1
  return found[0]


@pytest.fixture(scope="module")
def calls():
  return []


@pytest.fixture(scope="module")
def full(calls):
  def progress(done, total, what):
    calls.append((done, total))

  return run(attack=ATTACK, progress=progress)


def test_clean_and_subset_accuracy_are_those_computed_by_hand(full):
  report, params, batch = full
  for names in (("left",), ("right",), ("left", "right")):
    values = toy.logits(params, batch["inputs"], names)
    expected = np.mean(values.argmax(axis=-1) == batch["label"])
    entry = report.results["subsets"]["+".join(names)]
    assert entry["accuracy"] == pytest.approx(expected)
  assert report.results["clean"] == report.results["subsets"]["left+right"]


@pytest.mark.parametrize("names", [("left",), ("right",), ("left", "right")])
def test_certified_curve_is_the_distance_to_the_boundary(full, names):
  report, params, batch = full
  exact = toy.exact_radii(params, batch["inputs"], names=names)
  values = toy.logits(params, batch["inputs"])
  correct = values.argmax(axis=-1) == batch["label"]
  rows = [
    row
    for row in report.results["certified"]
    if row["modalities"] == list(names)
  ]
  assert len(rows) >= 33
  assert set(RADII) <= {row["radius"] for row in rows}
  assert all(row["sound"] and row["source"] == "global" for row in rows)
  for row in rows:
    # Slack may cost an example within a part in 10^4 of the boundary.
    high = np.mean(correct & (exact >= row["radius"]))
    low = np.mean(correct & (exact > row["radius"] * 1.0001 + 1e-4))
    assert low - 1e-9 <= row["accuracy"] <= high + 1e-9


@pytest.mark.parametrize("names", [("left",), ("right",), ("left", "right")])
def test_attack_reaches_the_boundary_and_not_beyond(full, names):
  report, params, batch = full
  exact = toy.exact_radii(params, batch["inputs"], names=names)
  values = toy.logits(params, batch["inputs"])
  correct = values.argmax(axis=-1) == batch["label"]
  for radius in RADII:
    found = pick(report.results, "attacked", radius, names)
    assert found >= np.mean(correct & (exact > radius * 1.0001)) - 1e-9
    assert found <= np.mean(correct & (exact > radius / 1.1)) + 1e-9


def test_all_checks_hold_and_linear_models_are_tight(full):
  results = full[0].results
  assert [check["passed"] for check in results["checks"]] == [True] * 4
  tightness = dict(
    zip(results["tightness"]["factors"], results["tightness"]["flipped"])
  )
  assert tightness[1.0] == 0.0
  assert tightness[1.2] > 0.95


def test_region_is_the_polytope_of_budgets(full):
  report, params, batch = full
  region = report.results["region"]
  assert region["modalities"] == ["left", "right"]
  values = toy.logits(params, batch["inputs"])
  rows = np.arange(len(values))
  top = values.argmax(axis=-1)
  correct = top == batch["label"]
  slopes = {
    m: np.linalg.norm(
      np.asarray(params["head"][m])[top][:, None]
      - np.asarray(params["head"][m])[None],
      axis=-1,
    )
    for m in toy.DIMS
  }
  for i, j in ((0, 0), (10, 5), (25, 30), (3, 40)):
    first, second = region["radii"][0][i], region["radii"][1][j]
    left = values[rows, top][:, None] - values
    left = left - slopes["left"] * first - slopes["right"] * second
    left[rows, top] = 1.0
    expected = np.mean(correct & np.all(left > 0, axis=-1))
    # One example may sit on a line of the grid.
    assert abs(region["accuracy"][i][j] - expected) <= 1.01 / len(values)


def test_shares_of_vulnerability_sum_to_one(full):
  shares = full[0].results["vulnerability"]
  assert sum(shares.values()) == pytest.approx(1.0, abs=1e-5)


def test_units_divide_the_radii():
  plain = run(**QUIET)[0].examples
  double = run(**QUIET, units={"left": 2.0, "right": 2.0})[0].examples
  np.testing.assert_allclose(
    plain["certified_radius"], 2 * double["certified_radius"], rtol=1e-5
  )


def test_attack_and_certificate_use_the_same_units():
  units = {"left": 3.0, "right": 0.5}
  report, params, batch = run(units=units, radii=(0.3,), attack=ATTACK)
  exact = toy.exact_radii(params, batch["inputs"], units)
  np.testing.assert_allclose(
    report.examples["certified_radius"], exact, rtol=1e-3, atol=1e-4
  )
  assert all(check["passed"] for check in report.results["checks"])
  found = pick(report.results, "attacked", 0.3, units)
  correct = report.examples["correct"]
  assert found <= np.mean(correct & (exact > 0.3 / 1.1)) + 1e-9


def test_relative_units_come_from_the_reference():
  reference = toy.make_batch(80, seed=3)
  del reference["label"]  # not read: it may be soft
  report, *_ = run(units="relative", reference=reference, **QUIET)
  for name, x in reference["inputs"].items():
    distance = np.linalg.norm(x - x.mean(axis=0), axis=-1)
    assert report.results["units"][name] == pytest.approx(np.median(distance))
  with pytest.raises(ValueError, match="reference"):
    run(units="relative", **QUIET)


def test_examples_with_nothing_present_are_in_no_average():
  batch = toy.make_batch()
  rows = np.array([0, 7, 59])
  keep = np.setdiff1d(np.arange(60), rows)
  smaller = jax.tree.map(lambda x: x[keep], batch)
  poisoned, *_ = run(batch=toy.without(batch, rows))
  clean, *_ = run(batch=smaller)
  for key in ("clean", "subsets", "certified", "vulnerability"):
    assert poisoned.results[key] == clean.results[key], key
  for radius in RADII:
    for names in (("left",), ("left", "right")):
      assert pick(poisoned.results, "attacked", radius, names) == pick(
        clean.results, "attacked", radius, names
      )
  assert poisoned.results["examples"]["num_left_out"] == 3
  assert not poisoned.examples["counted"][rows].any()


def test_a_missing_modality_cannot_be_attacked():
  batch = toy.make_batch()
  batch["present"]["right"][:] = False
  batch["inputs"]["right"][:] = np.nan
  report, *_ = run(batch=batch)
  clean = report.results["clean"]["accuracy"]
  assert pick(report.results, "attacked", RADII[-1], ("right",)) == clean
  assert pick(report.results, "certified", RADII[-1], ("right",)) == clean
  assert report.results["subsets"]["right"]["accuracy"] is None
  assert all(check["passed"] for check in report.results["checks"])


def test_a_lie_about_the_constant_is_found_and_said_aloud(caplog, tmp_path):
  with caplog.at_level(logging.ERROR):
    report, *_ = run(model=toy.linear_model(lipschitz=0.3))
  failed = {c["name"] for c in report.results["checks"] if not c["passed"]}
  assert failed == {
    "certified_at_most_attacked",
    "nothing_flips_inside_the_radius",
  }
  assert "THE CERTIFICATE IS WRONG" in caplog.text
  path = report.save(tmp_path / "report.html")
  assert 'class="alarm"' in path.read_text()


def test_an_attack_outside_its_budget_is_found(monkeypatch):
  def search(key, objective):
    return {
      name: jnp.zeros_like(x).at[:, 0].set(2 * objective.region.radius[name])
      for name, x in objective.region.clean.items()
    }

  def overreach(**arguments):
    attack = attacks.fgm(**arguments)
    return dataclasses.replace(attack, name="overreach", search=search)

  # The attack's own last projection would bring it back.
  monkeypatch.setattr(balls.Region, "finished", balls.Region.inputs)
  monkeypatch.setitem(attacks.registry.ATTACKS, "overreach", overreach)
  report, *_ = run(attack={"name": "overreach"}, certificate=None)
  check = report.results["checks"][0]
  assert check["name"] == "attacks_within_budget"
  assert not check["passed"]
  assert "2.8284" in check["message"]


def test_estimated_constants_are_never_called_certified(tmp_path):
  reference = toy.make_batch(80, seed=3)
  model = toy.linear_model(lipschitz=None)
  report, *_ = run(model=model, reference=reference)
  rows = report.results["certified"]
  assert rows
  assert all(not row["sound"] for row in rows)
  assert all(row["source"] == "empirical" for row in rows)
  assert "estimated_radius" in report.examples
  assert not any("certified" in column for column in report.examples)
  text = evaluation.table([report.results])
  assert "estimated" in text
  assert "certified" not in text
  page = report.save(tmp_path / "report.html").read_text()
  assert "Estimated" in page
  assert "certified accuracy" not in page
  assert "proven that" not in page


def test_no_reference_means_no_estimate():
  model = toy.linear_model(lipschitz=None)
  report, *_ = run(model=model, **QUIET)
  assert report.results["certified"] == []
  assert "none was given" in report.results["settings"]["certificate"]["reason"]
  with pytest.raises(ValueError, match="reference"):
    run(model=model, certificate="empirical", **QUIET)
  with pytest.raises(ValueError, match="left, right"):
    run(model=model, certificate="global", **QUIET)


@pytest.mark.parametrize("kind", [{"geometry": False}, {"mixed": True}])
def test_a_mixing_fusion_has_no_certificate(kind):
  model = toy.linear_model(**kind)
  report, *_ = run(model=model)
  assert report.results["certified"] == []
  assert report.results["region"] is None
  assert report.results["vulnerability"] is None
  assert len(report.results["attacked"]) == 6
  with pytest.raises(ValueError, match="smoothing"):
    run(model=model, certificate="global", **QUIET)


def test_chunks_and_devices_change_no_deterministic_number():
  mesh = jax.make_mesh(
    (8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  spec = jax.sharding.PartitionSpec("data")
  sharding = jax.sharding.NamedSharding(mesh, spec)
  whole, *_ = run(attack=None)
  chunked, *_ = run(attack=None, batch_size=7)
  sharded, *_ = run(attack=None, batch_size=13, sharding=sharding)
  for other in (chunked, sharded):
    for key in ("clean", "subsets", "certified"):
      assert other.results[key] == whole.results[key], key
    np.testing.assert_allclose(
      other.examples["certified_radius"],
      whole.examples["certified_radius"],
      rtol=1e-5,
    )


def test_a_model_that_lives_on_one_device_is_evaluated_on_eight():
  mesh = jax.make_mesh(
    (8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  sharding = jax.sharding.NamedSharding(
    mesh, jax.sharding.PartitionSpec("data")
  )
  model = toy.linear_model()

  def init(key):
    # What a checkpoint gives back is committed to the first device.
    return jax.device_put(toy.linear_model().init(key), jax.devices()[0])

  model = dataclasses.replace(model, init=init)
  report, *_ = run(model=model, sharding=sharding, attack=None)
  expected, *_ = run(attack=None)
  assert report.results["certified"] == expected.results["certified"]


def test_an_error_of_a_run_is_no_refusal(monkeypatch):
  whole = batches.Device.map

  def broken(self, *arguments, extra=lambda number: (), **options):
    if any(isinstance(x, certification.SensitivityTables) for x in extra(0)):
      raise ValueError("the device is gone")
    return whole(self, *arguments, extra=extra, **options)

  monkeypatch.setattr(batches.Device, "map", broken)
  with pytest.raises(ValueError, match="the device is gone"):
    run(**QUIET)


def test_attacks_run_on_a_sharded_batch():
  mesh = jax.make_mesh(
    (8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  spec = jax.sharding.PartitionSpec("data")
  report, *_ = run(
    sharding=jax.sharding.NamedSharding(mesh, spec), radii=(0.6,)
  )
  assert all(check["passed"] for check in report.results["checks"])
  assert report.results["settings"]["num_devices"] == 8


def test_more_radii_compile_nothing_more():
  counts = []
  for radii in ((0.3,), (0.1, 0.2, 0.3, 0.4)):
    traces = []
    model = toy.linear_model(traces=traces)
    run(model=model, radii=radii, certificate=None)
    counts.append(len(traces))
  assert counts[0] == counts[1]


def test_attacked_accuracy_falls_with_the_radius_and_the_threat(full):
  results = full[0].results
  for names in (("left",), ("right",), ("left", "right")):
    values = [pick(results, "attacked", radius, names) for radius in RADII]
    assert values == sorted(values, reverse=True)
  for radius in RADII:
    joint = pick(results, "attacked", radius, ("left", "right"))
    assert joint <= pick(results, "attacked", radius, ("left",))


def test_survivors_only_is_an_economy_not_another_result():
  economy, *_ = run(certificate=None)
  whole, *_ = run(certificate=None, survivors_only=False)
  pairs = zip(economy.results["attacked"], whole.results["attacked"])
  for row, other in pairs:
    assert abs(row["accuracy"] - other["accuracy"]) <= 1.01 / 60


def test_the_same_seed_gives_the_same_rows(full):
  again, *_ = run(attack=ATTACK, certificate=None)
  same = [name for name in full[0].examples if name.startswith("robust/")]
  assert len(same) == 6
  for name in same:
    np.testing.assert_array_equal(full[0].examples[name], again.examples[name])


def test_progress_counts_to_its_total(full, calls):
  assert [done for done, _ in calls] == list(range(1, len(calls) + 1))
  assert {total for _, total in calls} == {len(calls)}


def test_what_is_not_attacked_is_encoded_once():
  calls = []
  plain = toy.linear_model()

  @jax.custom_vjp
  def seen(x):
    """The same x, and a note that it was computed."""
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(lambda v: (calls.append(1), v)[1], shape, x)

  seen.defvjp(lambda x: (seen(x), None), lambda _, cotangent: (cotangent,))

  def encode(*arguments, **options):
    embeddings, state = plain.encode(*arguments, **options)
    return {**embeddings, "right": seen(embeddings["right"])}, state

  params, state = plain.init(jax.random.key(0))
  data = batches.host_data(plain, toy.make_batch(8))
  units = dict.fromkeys(toy.DIMS, 1.0)
  found = {}
  for name, model in (
    ("plain", plain),
    ("counted", dataclasses.replace(plain, encode=encode)),
  ):
    device = batches.Device(params, state)
    run = matrix.Attacker(
      model,
      device,
      attacks.make(norm=2, budget=1.0, **ATTACK),
      forwards.Forward(model, device, size=8),
      units=units,
      norm=2,
      size=8,
    )
    for attacked in (("left",), ("right",), ("left", "right")):
      calls.clear()
      struck = run(jax.random.key(1), data, np.arange(8), attacked, 0.5)
      found[name, attacked] = struck.broken, len(calls)
  for attacked in (("left",), ("right",), ("left", "right")):
    np.testing.assert_array_equal(
      found["plain", attacked][0], found["counted", attacked][0]
    )
  steps = ATTACK["num_steps"] * ATTACK["num_restarts"]
  assert found["counted", ("left",)][1] < 5
  assert found["counted", ("right",)][1] >= steps
  assert found["counted", ("left", "right")][1] >= steps
