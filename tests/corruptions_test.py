"""The contract of all corruptions, placement, and the suite."""

import doctest
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from corruptions_batches import KEY
from corruptions_batches import SHAPES
from corruptions_batches import apply
from corruptions_batches import make
from corruptions_batches import make_batch
from corruptions_batches import of
from corruptions_batches import take
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from robust_mm import corruptions
from robust_mm import modalities

EVERY = corruptions.kinds()


@pytest.mark.parametrize("kind", EVERY)
def test_severity_zero_is_the_identity_bit_by_bit(kind):
  batch = make_batch()
  batch["inputs"]["vector"][0, :2] = [-0.0, 1e-42]
  found, present = apply(make(kind, 0), batch)
  for name, value in batch["inputs"].items():
    assert np.asarray(found[name]).tobytes() == value.tobytes()
    assert np.array_equal(present[name], batch["present"][name])


@pytest.mark.parametrize("kind", EVERY)
def test_absent_inputs_stay_untouched_and_their_nans_go_nowhere(kind):
  batch = make_batch()
  for name in SHAPES:
    batch["inputs"][name][~batch["present"][name]] = np.nan
  found, present = apply(make(kind, 5), batch)
  for name, value in batch["inputs"].items():
    gone, left = ~batch["present"][name], np.asarray(present[name])
    assert not np.any(left & gone)
    assert np.asarray(found[name])[gone].tobytes() == value[gone].tobytes()
  seen = modalities.mask(found, present)
  assert all(np.all(np.isfinite(value)) for value in seen.values())


@pytest.mark.parametrize("kind", EVERY)
def test_neither_the_batch_nor_its_order_changes_a_result(kind):
  batch = make_batch(16)
  # Compiled for all tests without; with, half of the kinds.
  correlated = kind in ("frame_drop", "shift", "stuck", "absent")
  corruption = make(kind, 3, share=0.7, correlated=correlated)
  whole, present = apply(corruption, batch, donors=batch)
  for rows in ([9, 2, 14, 0, 5], list(range(15, -1, -1))):
    part, left = apply(corruption, take(batch, np.array(rows)), donors=batch)
    for name in whole:
      np.testing.assert_allclose(part[name], whole[name][np.array(rows)], 1e-5)
      np.testing.assert_array_equal(left[name], present[name][np.array(rows)])


@pytest.mark.parametrize("kind", EVERY)
def test_eight_devices_give_the_same_result(kind):
  # Whether axes are explicit matters to tracing alone; half of the kinds each
  # but for the one that gathers.
  _check_sharded(kind, "Auto" if len(kind) % 2 else "Explicit")
  if kind == "swap":
    _check_sharded(kind, "Auto")


def _check_sharded(kind, axis_type):
  axis = getattr(jax.sharding.AxisType, axis_type)
  mesh = jax.make_mesh((8,), ("data",), (axis,))
  batch = make_batch(16)
  corruption = make(kind, 3, share=0.8)
  run = functools.partial(apply, corruption)
  expected = run(batch, donors=batch)
  with jax.set_mesh(mesh):
    sharded = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    donors = jax.device_put(batch, NamedSharding(mesh, PartitionSpec()))
    found = run(sharded, donors=donors)
  for got, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
    np.testing.assert_allclose(np.asarray(got), wanted, 1e-5, 1e-6)


@pytest.mark.parametrize("kind", EVERY)
def test_one_compilation_serves_all_severities(kind):
  batch, traces = make_batch(), []

  @jax.jit
  def run(corruption, key, batch):
    traces.append(kind)
    return apply.__wrapped__(corruption, batch, key=key, donors=batch)

  for severity in range(6):
    corruption = make(kind, severity, share=0.9)
    run(corruption, jax.random.key(severity), batch)
  assert len(traces) == 1
  assert hash(corruption) == hash(make(kind, 5, share=0.9))


def test_zeros_and_absent_hit_the_same_rows_but_nobody_loses_everything():
  size = 400
  value = np.ones((size, 2), np.float32)
  ones = np.ones(size, bool)
  inputs, present = {"a": value, "b": value}, {"a": ones, "b": ones}
  for correlated in (False, True):
    chosen = {"severity": 3, "correlated": correlated}
    zeroed, still = corruptions.zeros(**chosen)(KEY, inputs, present)
    assert all(np.all(flag) for flag in still.values())
    left_inputs, left = corruptions.absent(**chosen)(KEY, inputs, present)
    kept = {n: np.asarray(zeroed[n])[:, 0] == 1 for n in inputs}
    some = kept["a"] | kept["b"]
    for name in inputs:
      flag = np.asarray(left[name])
      np.testing.assert_array_equal(flag[some], kept[name][some])
      np.testing.assert_array_equal(np.asarray(left_inputs[name])[:, 0], flag)
    rescued = np.asarray(left["a"])[~some]
    assert np.all(rescued != np.asarray(left["b"])[~some])
    assert 0.3 < rescued.mean() < 0.7


@pytest.mark.parametrize("kind", ["zeros", "frame_drop", "shift"])
@pytest.mark.parametrize("correlated", [False, True])
def test_modalities_share_decisions_only_when_correlated(kind, correlated):
  size = 600
  rows = np.arange(1, 9, dtype=np.float32)[None, :, None]
  value = rows.repeat(size, 0)
  ones = np.ones(size, bool)
  found, _ = make(kind, 3, correlated=correlated, share=0.8)(
    KEY, {"a": value, "b": value}, {"a": ones, "b": ones}
  )
  changed = {n: np.asarray(x)[..., 0] == 0 for n, x in found.items()}
  equal = np.array_equal(changed["a"], changed["b"])
  assert equal == correlated
  if not correlated:
    a, b = (x.any(-1) for x in changed.values())
    error = 4 * 0.5 / np.sqrt(size)
    assert abs(np.mean(a & b) - a.mean() * b.mean()) < error


def test_a_slow_modality_is_the_clock_of_correlated_drops():
  size = 50
  ones = np.ones(size, bool)
  inputs = {
    "fast": np.ones((size, 24, 2), np.float32),
    "slow": np.ones((size, 6, 2), np.float32),
  }
  found, _ = corruptions.frame_drop(severity=3, correlated=True)(
    KEY, inputs, {"fast": ones, "slow": ones}
  )
  slow = np.asarray(found["slow"])[..., 0]
  fast = np.asarray(found["fast"])[..., 0]
  np.testing.assert_array_equal(fast, slow.repeat(4, 1))


def test_the_share_of_rows_is_kept():
  value = np.ones((4000, 3), np.float32)
  for share in (0.25, 0.6):
    changed = np.any(of("additive", 2, value, share=share) != value, -1)
    assert abs(changed.mean() - share) < 4 * 0.5 / np.sqrt(4000)


def test_integers_and_half_precision_keep_their_types():
  value = np.random.default_rng(0).integers(0, 256, (8, 6, 6, 1), np.uint8)
  for kind in corruptions.kinds("image"):
    corruption = make(
      kind, 4, **({"scale": 300.0} if kind == "additive" else {})
    )
    for dtype in (jnp.uint8, jnp.bfloat16):
      given = jax.ShapeDtypeStruct(value.shape, dtype)
      found, _ = jax.eval_shape(
        lambda x, corruption=corruption: corruption(
          KEY, {"m": x}, {"m": np.ones(8, bool)}, label=np.arange(8)
        ),
        given,
      )
      assert found["m"].dtype == dtype
  found = of("additive", 5, value, scale=300.0)
  assert {0, 255} <= set(np.unique(found))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint32, jnp.int16])
def test_wide_integers_stop_at_the_end_of_their_range(dtype):
  top = np.iinfo(dtype).max
  value = np.full((4, 50, 2), top, dtype)
  noisy = corruptions.additive(severity=5, scale=float(top))
  found, _ = noisy(
    jax.random.key(0),
    {"m": jnp.asarray(value)},
    {"m": jnp.ones(4, bool)},
    id=jnp.arange(4),
  )
  # Noise goes up about half of the time; none of it may wrap around.
  assert np.mean(np.asarray(found["m"], float) > 0.99 * top) > 0.4


def test_the_suite_names_what_makes_sense():
  found = corruptions.suite(
    {**SHAPES, "token": jax.ShapeDtypeStruct((10,), jnp.int32)}
  )
  kinds = {name.split("/")[0] for name in found}
  assert kinds == set(EVERY)
  by_place = {
    m: {n.split("/")[0] for n in found if n.split("/")[1] == m} for m in SHAPES
  }
  assert by_place["image"] == set(corruptions.kinds("image"))
  assert by_place["video"] == set(corruptions.kinds("video")) - {"channel_drop"}
  batch = make_batch()
  for corruption in corruptions.suite(
    SHAPES, severities=(5,), modalities="all", correlated=True
  ).values():
    assert corruption.targets(batch["inputs"]) == corruption.modalities
    assert "token" not in corruption.modalities
  skeleton = corruptions.suite(
    {"skeleton": (32, 20, 3)}, forms={"skeleton": "sequence"}, kinds=["shift"]
  )
  assert list(skeleton) == [f"shift/skeleton/{s}" for s in range(1, 6)]


def test_the_deviations_of_training_data_are_those_of_the_present():
  batch = make_batch(200)
  batch["inputs"]["sequence"][..., 1] *= 100
  batch["inputs"]["sequence"][~batch["present"]["sequence"]] = 1e9
  found = corruptions.deviations(batch)
  np.testing.assert_allclose(found["sequence"], [2, 200, 2], rtol=0.1)
  assert len(found["vector"]) == 7
  hash(corruptions.additive(severity=1, scale=found))


@pytest.mark.parametrize(
  "function, message",
  [
    (lambda: corruptions.blur(severity=6), "severity must be"),
    (lambda: corruptions.blur(severity=-1), "severity must be"),
    (lambda: corruptions.blur(severity=1, share=2.0), "share must lie"),
    (lambda: corruptions.additive(severity=1, scale=-1.0), "scale must be"),
    (lambda: corruptions.shift(severity=1, strength=2.0), "strength must lie"),
    (lambda: corruptions.blur(severity=1, forms={"a": "im"}), "forms"),
    (lambda: corruptions.suite({"a": (3,)}, kinds=["blurr"]), "Did you mean"),
    (lambda: corruptions.suite({"a": (3,)}, modalities="one"), "modalities"),
    (lambda: of("blur", 1, np.ones((2, 3)), modalities="m"), "a vector; blur"),
    (lambda: of("zeros", 1, np.ones((2, 3)), modalities="x"), "unknown mod"),
    (lambda: of("swap", 1, np.ones((2, 3))), "label is missing"),
    (lambda: of("additive", 1, np.ones((2, 3)), scale={"x": 1}), "scale must"),
  ],
)
def test_a_bad_argument_is_refused_by_name(function, message):
  with pytest.raises(ValueError, match=message):
    function()


@pytest.mark.parametrize(
  "name",
  [
    "corruptions.factories",
    "corruptions.forms",
    "corruptions.registry",
    "evaluation.metrics",
    "missing",
  ],
)
def test_examples_are_right(name):
  module = importlib.import_module(f"robust_mm.{name}")
  found = doctest.testmod(module, extraglobs={"np": np})
  assert found.attempted
  assert not found.failed
