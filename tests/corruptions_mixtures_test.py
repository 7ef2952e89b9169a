"""Mixtures: a kind a batch, a strength an example."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from robust_mm import corruptions

SEQUENCE = jnp.ones((64, 20, 3))
EVERYONE = jnp.ones(64, bool)


def test_a_strength_for_every_example_is_that_of_its_own():
  key = jax.random.key(3)
  x = {"a": jax.random.normal(jax.random.key(0), (4, 20, 3))}
  present = {"a": jnp.ones(4, bool)}
  strengths = (0.1, 0.3, 0.5, 0.9)
  for kind in ("frame_drop", "clip", "occlusion", "shift", "band_limit"):
    made = getattr(corruptions, kind)(severity=5)
    each = dataclasses.replace(made, strength=jnp.asarray(strengths))
    together, _ = each(key, x, present)
    for row, strength in enumerate(strengths):
      one = dataclasses.replace(made, strength=strength)
      alone, _ = one(key, x, present)
      np.testing.assert_allclose(
        together["a"][row], alone["a"][row], atol=1e-6, err_msg=kind
      )


def test_strengths_range_over_the_table():
  mixture = corruptions.mixture(["frame_drop"])
  lost = []
  for seed in range(40):
    found = mixture(jax.random.key(seed), "a", SEQUENCE, EVERYONE)
    lost.append(np.mean(np.asarray(found[:, :, 0]) == 0, axis=1))
  lost = np.concatenate(lost)
  # Rates are uniform in [.1, .9]: mean .5, deviation .231; binomial of 20
  # frames adds .102 to it in quadrature.
  assert abs(lost.mean() - 0.5) < 0.02
  assert abs(lost.std() - np.hypot(0.231, 0.102)) < 0.02


def test_kinds_are_drawn_alike_and_only_fitting_ones():
  mixture = corruptions.mixture(["channel_drop", "frame_drop", "token_drop"])
  whole_frames = 0
  for seed in range(200):
    found = np.asarray(mixture(jax.random.key(seed), "a", SEQUENCE, EVERYONE))
    gone = found == 0
    frames = np.all(gone == gone[:, :, :1])
    channels = np.all(gone == gone[:, :1])
    assert frames or channels
    whole_frames += int(frames and not channels)
  assert abs(whole_frames / 200 - 0.5) < 0.15  # four standard errors
  tokens = jnp.ones((4, 7), jnp.int32)
  same = corruptions.mixture(["blur"])(
    jax.random.key(0), "words", tokens, jnp.ones(4, bool)
  )
  assert same is tokens


def test_only_touched_rows_change_and_the_mixture_is_jitted():
  mixture = corruptions.mixture(["additive", "occlusion"], scale=2.0)
  touched = jnp.arange(64) % 3 == 0
  traces = []

  @jax.jit
  def run(key):
    traces.append(1)
    return mixture(key, "a", SEQUENCE, touched)

  for seed in range(6):
    found = run(jax.random.key(seed))
    changed = np.any(np.asarray(found != SEQUENCE), axis=(1, 2))
    np.testing.assert_array_equal(changed, touched)
    np.testing.assert_array_equal(found, run(jax.random.key(seed)))
  assert len(traces) == 1


@pytest.mark.parametrize("kinds", [[], ["swap"], ["zeros"], ["blurr"]])
def test_bad_kinds_are_named(kinds):
  with pytest.raises(ValueError, match="kinds"):
    corruptions.mixture(kinds)


def test_the_only_channel_is_never_dropped():
  mixture = corruptions.mixture(["channel_drop"])
  assert mixture.fitting("a", (8, 8, 1)) == ()
  assert len(mixture.fitting("a", (8, 8, 2))) == 1


@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_eight_devices_damage_like_one(axis_type):
  axis = getattr(jax.sharding.AxisType, axis_type)
  mesh = jax.make_mesh((8,), ("data",), (axis,))
  kinds = ["additive", "band_limit", "blur", "channel_drop", "frame_drop"]
  mixture = corruptions.mixture(kinds)
  x = jax.random.normal(jax.random.key(0), (64, 20, 3))
  touched = jnp.arange(64) % 2 == 0

  @jax.jit
  def run(key, x, touched):
    return jax.lax.cond(
      jnp.all(key[0] >= 0),
      lambda x: mixture(jax.random.wrap_key_data(key), "a", x, touched),
      lambda x: x,
      x,
    )

  for seed in range(6):
    key = jax.random.key_data(jax.random.key(seed))
    expected = np.asarray(run(key, x, touched))
    with jax.set_mesh(mesh):
      rows = NamedSharding(mesh, PartitionSpec("data"))
      found = run(key, jax.device_put(x, rows), jax.device_put(touched, rows))
    np.testing.assert_allclose(np.asarray(found), expected, 1e-5, 1e-5)
