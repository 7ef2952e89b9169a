"""The contract of augmentations: keys, absence, types, devices, refusals."""

import doctest
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from robust_mm import augmentations

KEY = jax.random.key(5)
SHAPES = {
  "image": (6, 5, 3),
  "sequence": (12, 6),
  "vector": (9,),
  "video": (6, 4, 4, 3),
}
FULL = {
  "warp_time": {"scale": 1.4, "shift": 0.3},
  "rotate": {"angle": 0.5},
  "scale": {"deviation": 0.2, "per": "channel"},
  "move": {"scale": 0.2, "shift": 0.3},
  "brighten": {"deviation": 0.5},
  "erase": {"share": 0.3},
  "noise": {"deviation": 0.1},
}
IDLE = {
  "warp_time": {"scale": 1.0, "shift": 0},
  "rotate": {"angle": 0.0, "axis": "y"},
  "scale": {"deviation": 0.0, "per": "axis"},
  "move": {"scale": 0.0, "shift": 0.0},
  "brighten": {"deviation": 0.0, "where": "everywhere"},
  "erase": {"share": 0.0},
  "noise": {"deviation": 0.0},
}
TIMED = ("sequence", "video")
SPACED = ("image", "video")
BOXED = ("image", "sequence", "video")
FITTING = {"warp_time": TIMED, "move": SPACED, "erase": BOXED}


def make_batch(size=16, seed=0):
  rng = np.random.default_rng(seed)
  inputs = {
    name: rng.normal(1.0, 2.0, (size, *shape)).astype(np.float32)
    for name, shape in SHAPES.items()
  }
  present = {name: np.arange(size) % 4 != i for i, name in enumerate(inputs)}
  return {"inputs": inputs, "present": present, "label": np.zeros(size, int)}


def settings_of(table, kinds=tuple(FULL)):
  """Every operation on every modality it makes sense for."""
  return {
    name: {k: table[k] for k in kinds if name in FITTING.get(k, SHAPES)}
    for name in SHAPES
  }


def run(settings, batch, key=KEY):
  return jax.jit(augmentations.make(settings))(key, None, None, batch)["inputs"]


def rows(flag, value):
  return value[np.asarray(flag)]


@pytest.mark.parametrize("kind", FULL)
def test_every_present_example_changes_and_no_absent_one(kind):
  settings = settings_of(FULL, (kind,))
  batch = make_batch()
  for name in SHAPES:
    batch["inputs"][name][~batch["present"][name]] = np.nan
  found = run(settings, batch)
  for name, value in batch["inputs"].items():
    here, got = batch["present"][name], np.asarray(found[name])
    assert got.dtype == value.dtype
    assert got.shape == value.shape
    assert rows(~here, got).tobytes() == rows(~here, value).tobytes()
    assert np.all(np.isfinite(rows(here, got)))
    changed = np.any((got != value).reshape(16, -1), -1)[here]
    assert np.all(changed) if settings[name] else not np.any(changed)


def test_strength_zero_is_the_identity_bit_by_bit():
  batch = make_batch()
  for value in batch["inputs"].values():
    value.reshape(16, -1)[:, :3] = [-0.0, 1e-42, np.inf]
  found = run(settings_of(IDLE), batch)
  for name, value in batch["inputs"].items():
    assert np.asarray(found[name]).tobytes() == value.tobytes()


def test_a_result_is_a_function_of_the_key():
  batch = make_batch()
  settings = settings_of(FULL)
  first, again = run(settings, batch), run(settings, batch)
  other = run(settings, batch, jax.random.key(6))
  for name in SHAPES:
    np.testing.assert_array_equal(first[name], again[name])
    here = batch["present"][name]
    assert np.all(rows(here, first[name]) != rows(here, other[name]))


def test_neither_presence_nor_later_rows_change_the_draw_of_a_row():
  batch = make_batch()
  first = run(settings_of(FULL), batch)
  part = jax.tree.map(lambda x: x[:8], batch)
  part["present"] = {n: np.ones(8, bool) for n in SHAPES}
  found = run(settings_of(FULL), part)
  for name in SHAPES:
    here = batch["present"][name][:8]
    np.testing.assert_allclose(
      rows(here, found[name]), rows(here, first[name][:8]), 1e-5, 1e-5
    )


def test_modalities_examples_and_operations_draw_independently():
  size = 500
  zeros = np.zeros((size, 40), np.float32)
  ones = np.ones(size, bool)
  noise = {"brighten": {"deviation": 1.0, "where": "everywhere"}}
  batch = {
    "inputs": {"a": zeros, "b": zeros},
    "present": {"a": ones, "b": ones},
  }
  found = run({"a": noise, "b": noise}, batch)
  a, b = (np.asarray(found[n])[:, 0] for n in "ab")
  bound = 4 / np.sqrt(size)
  assert abs(np.corrcoef(a, b)[0, 1]) < bound
  assert abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < bound
  both = {**noise, "noise": {"deviation": 1.0}}
  added = np.asarray(run({"a": both}, batch)["a"])[:, 0] - a
  assert abs(np.corrcoef(a, added)[0, 1]) < bound
  assert abs(np.std(added) - 1) < bound


def test_the_order_is_that_of_the_documentation():
  kinds = ("brighten", "noise")
  written = {k: {"deviation": 1.0} for k in kinds}
  batch = {"inputs": {"a": np.zeros((50, 9), np.float32)}}
  batch["present"] = {"a": np.ones(50, bool)}
  # The other way round, noise above zero would be brightened.
  for chosen in (written, dict(reversed(written.items()))):
    found = np.asarray(run({"a": chosen}, batch)["a"])
    alone = np.asarray(run({"a": {"noise": {"deviation": 1.0}}}, batch)["a"])
    np.testing.assert_array_equal(found, alone)
  text = importlib.import_module("robust_mm.augmentations").__doc__
  places = [text.index(f"- ``{kind}``") for kind in FULL]
  assert places == sorted(places)


@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_eight_devices_give_the_same_result(axis_type):
  axis = getattr(jax.sharding.AxisType, axis_type)
  mesh = jax.make_mesh((8,), ("data",), (axis,))
  batch, settings = make_batch(), settings_of(FULL)
  expected = run(settings, batch)
  with jax.set_mesh(mesh):
    sharded = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    found = run(settings, sharded)
  for name in SHAPES:
    assert found[name].sharding.spec[0] == "data"
    np.testing.assert_allclose(
      np.asarray(found[name]), expected[name], 1e-5, 1e-5
    )


def test_one_trace_serves_all_keys_and_batches():
  traces = []
  augment = augmentations.make(settings_of(FULL))

  @jax.jit
  def step(key, batch):
    traces.append(1)
    return augment(key, None, None, batch)

  for seed in range(3):
    step(jax.random.key(seed), make_batch(seed=seed))
  assert len(traces) == 1


def test_values_are_hashable_and_go_through_jit():
  noise = augmentations.noise(deviation=1)
  assert noise == augmentations.noise(deviation=1.0)
  assert hash(noise) == hash(augmentations.noise(deviation=1.0))
  call = jax.jit(lambda a, x: a(KEY, x, jnp.ones(4, bool)))
  x = jnp.zeros((4, 3))
  np.testing.assert_array_equal(call(noise, x), noise(KEY, x, np.ones(4, bool)))


@pytest.mark.parametrize("kind", FULL)
def test_half_precision_stays_and_is_computed_in_float32(kind):
  batch = make_batch()
  half = {
    name: jnp.asarray(x, jnp.bfloat16) for name, x in batch["inputs"].items()
  }
  settings = settings_of(FULL, (kind,))
  found = run(settings, {**batch, "inputs": half})
  wide = {name: x.astype(jnp.float32) for name, x in half.items()}
  expected = run(settings, {**batch, "inputs": wide})
  for name, value in found.items():
    assert value.dtype == jnp.bfloat16
    wanted = expected[name].astype(jnp.bfloat16)
    np.testing.assert_allclose(
      np.asarray(value, np.float32), np.asarray(wanted, np.float32), 1e-2, 1e-2
    )


@pytest.mark.parametrize(
  "settings, words",
  [
    ({"smell": {}}, "settings names the unknown modality 'smell'"),
    ({"imgae": {}}, "Did you mean 'image'"),
    ({"image": 3}, r"settings\.image must be a group"),
    ({"image": {"move": 3}}, r"settings\.image\.move must be a group"),
    ({"image": {"mvoe": {}}}, r"settings\.image\.mvoe.*Did you mean 'move'"),
    (
      {"image": {"move": {"shfit": 1}}},
      r"settings\.image\.move\.shfit.*Did you mean 'shift'",
    ),
    ({"image": {"noise": {}}}, r"settings\.image\.noise\.deviation is missing"),
    ({"image": {"noise": {"deviation": -1}}}, r"image\.noise\.deviation must"),
    ({"image": {"noise": {"deviation": "a"}}}, "must be a number, got 'a'"),
    ({"image": {"noise": {"deviation": True}}}, "must be a number, got True"),
    ({"image": {"noise": {"deviation": np.inf}}}, "finite, got inf"),
    ({"image": {"noise": {"deviation": np.nan}}}, "finite, got nan"),
    ({"image": {"erase": {"share": 1.5}}}, r"share must lie in \[0, 1\]"),
    ({"video": {"warp_time": {"scale": 0.5}}}, r"scale must be at least 1"),
    ({"video": {"rotate": {"angle": 1, "axis": "w"}}}, r"rotate\.axis must be"),
    ({"video": {"rotate": {"angle": 1, "groups": 0}}}, r"rotate\.groups must"),
    ({"video": {"rotate": {"angle": 1, "groups": 1.0}}}, "must be an integer"),
    ({"image": {"scale": {"deviation": 1, "per": "row"}}}, r"scale\.per must"),
    ({"image": {"brighten": {"deviation": 1, "where": "sky"}}}, "where must"),
    ({"sequence": {"move": {}}}, r"settings\.sequence\.move is for image, vid"),
    ({"image": {"warp_time": {}}}, "'image' is an image of shape"),
    ({"vector": {"erase": {"share": 0.1}}}, "erase is for image, sequence"),
    (
      {"odd": {"rotate": {"angle": 1.0}}},
      r"settings\.odd\.rotate is for vectors .* 'odd' has 4 entries",
    ),
    ({"odd": {"scale": {"deviation": 1, "per": "axis"}}}, "no multiple of 3"),
    (
      {"vector": {"rotate": {"angle": 1, "groups": 2}}},
      r"rotate\.groups must divide the 3 vectors",
    ),
    (
      {"words": {"noise": {"deviation": 1}}},
      r"settings\.words\.noise is for floating.* 'words' holds int32",
    ),
    ({"deep": {"noise": {"deviation": 1}}}, "'deep' is an array of shape"),
  ],
)
def test_a_mistake_is_one_sentence_naming_the_key(settings, words):
  shapes = {**SHAPES, "odd": (5, 4), "deep": (2, 2, 2, 2, 2)}
  inputs = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}
  inputs["words"] = jax.ShapeDtypeStruct((7,), jnp.int32)
  with pytest.raises(ValueError, match=words) as error:
    augmentations.check(settings, inputs)
  assert "\n" not in str(error.value)
  batch = {
    "inputs": {n: jnp.zeros((2, *x.shape), x.dtype) for n, x in inputs.items()},
    "present": {n: jnp.ones(2, bool) for n in inputs},
  }
  with pytest.raises(ValueError, match=words):
    augmentations.make(settings)(KEY, None, None, batch)


def test_a_value_by_itself_refuses_by_its_own_name():
  with pytest.raises(ValueError, match=r"rotate\.angle must be non-negative"):
    augmentations.rotate(angle=-1.0)
  rotate = augmentations.rotate(angle=1.0)
  with pytest.raises(ValueError, match="the last axis of the input has 4"):
    rotate(KEY, jnp.zeros((2, 4)), jnp.ones(2, bool))
  with pytest.raises(ValueError, match="floating inputs; the input holds int"):
    rotate(KEY, jnp.zeros((2, 3), int), jnp.ones(2, bool))


def test_doctests():
  module = importlib.import_module("robust_mm.augmentations.factories")
  found = doctest.testmod(module)
  assert found.attempted
  assert not found.failed
