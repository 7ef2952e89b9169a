"""Sub-sampling: what is seen, how it is drawn, which budgets it covers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_mm import smoothing
from robust_mm.smoothing import bounds
from robust_mm.smoothing import noise as noise_lib

KEY = jax.random.key(3)


@pytest.mark.parametrize("number, kept", [(5, 2), (5, 4), (6, 6), (4, 1)])
def test_every_choice_is_equally_likely_and_exact(number, kept):
  rows = 40_000
  chosen = np.asarray(noise_lib.choose(KEY, rows, number, kept))
  assert np.all(chosen.sum(axis=-1) == kept)
  codes = chosen @ (1 << np.arange(number))
  found, times = np.unique(codes, return_counts=True)
  total = np.prod(np.arange(number - kept + 1, number + 1))
  total //= np.prod(np.arange(1, kept + 1))
  assert len(found) == total
  share = rows / total
  assert np.max(np.abs(times - share)) < 5 * np.sqrt(share)


@pytest.mark.parametrize(
  "shape, axes, group",
  [
    ((4, 3, 2), None, (4, 3, 1)),  # pixels
    ((5, 3), None, (5, 1)),  # frames
    ((6,), None, (6,)),  # tokens
    ((4, 3, 2, 1), (0,), (4, 1, 1, 1)),  # frames of a video
    ((4, 3), (0, 1), (4, 3)),  # every entry
  ],
)
def test_entries_of_an_element_stay_or_go_together(shape, axes, group):
  axes = None if axes is None else {"a": axes}
  noise = smoothing.subsample(keep={"a": 2}, axes=axes, fill=-7.0)
  value = 1 + np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
  copies = jnp.broadcast_to(value, (8, *shape))
  seen = np.asarray(smoothing.apply(noise, KEY, {"a": copies})["a"])
  kept = seen == value
  assert np.all(kept | (seen == -7))
  # One flag an element, the same in all its entries.
  extra = tuple(i + 1 for i, size in enumerate(group) if size == 1)
  extra = tuple(i for i in extra if shape[i - 1] > 1)
  flags = kept.all(axis=extra, keepdims=True) if extra else kept
  np.testing.assert_array_equal(np.broadcast_to(flags, kept.shape), kept)
  assert np.all(
    flags.reshape(8, -1).sum(axis=-1)
    == 2 * (flags.reshape(8, -1).shape[1] // noise.num_elements("a", shape))
  )
  assert len(np.unique(seen.reshape(8, -1), axis=0)) > 1


def test_mask_channel_says_what_was_kept():
  noise = smoothing.subsample(
    keep={"image": 3, "words": 2}, mask_channel=("image", "words")
  )
  inputs = {
    "image": jnp.ones((4, 3, 2, 2)),
    "words": jnp.ones((4, 5), jnp.int32),
    "whole": jnp.ones((4, 2)),
  }
  seen = smoothing.apply(noise, KEY, inputs)
  assert seen["image"].shape == (4, 3, 2, 3)
  np.testing.assert_array_equal(seen["image"][..., 0], seen["image"][..., 2])
  assert np.all(np.sum(seen["image"][..., 2], axis=(1, 2)) == 3)
  assert seen["words"].shape == (4, 5, 2)
  assert seen["words"].dtype == jnp.int32
  np.testing.assert_array_equal(seen["words"][..., 0], seen["words"][..., 1])
  np.testing.assert_array_equal(seen["whole"], inputs["whole"])


def majority(inputs, present):
  """Whether more kept entries are positive than negative."""
  del present
  total = sum(jnp.sum(x, axis=-1) for x in inputs.values())
  return jnp.stack([total, -total], axis=-1)


def certificate(**options):
  batch = {
    "inputs": {
      "a": np.ones((3, 12), np.float32),
      "b": np.ones((3, 6), np.float32),
    },
    "present": {
      "a": np.array([True, True, False]),
      "b": np.array([True, False, True]),
    },
  }
  noise = smoothing.subsample(keep={"a": 2, "b": 1})
  options = {"noise": noise, "num_estimation": 2000, **options}
  return smoothing.certify(majority, batch, key=KEY, **options)


@pytest.mark.parametrize("change", bounds.CHANGES)
def test_covers_is_the_rule_of_the_method(change):
  found = certificate()
  p = 1e-3 ** (1 / 2000)
  for a in range(14):
    for b in range(8):
      q, moved = 1.0, 1.0
      for number, kept, r in ((12, 2, a), (6, 1, b)):
        if change != "add" and r > number:
          q, moved = 0.0, 0.0
          continue
        pair = smoothing.overlap(number, kept, r, change)
        q, moved = q * pair[0][-1], moved * pair[1][-1]
      wanted = smoothing.kept_probability(p, q, moved) > 0.5
      assert found.covers({"a": a, "b": b}, change=change)[0] == wanted, (a, b)
  assert not found.covers({"a": np.inf}, change=change)[0]


def test_radii_count_elements_and_the_joint_one_holds_for_every_split():
  found = certificate()
  alone = found.modality_radius
  assert np.isposinf(alone["a"][2])
  assert np.isposinf(alone["b"][1])
  for name in ("a", "b"):
    most = int(alone[name][0])
    assert most >= 1
    assert found.covers({name: most})[0]
    assert not found.covers({name: most + 1})[0]
  joint = int(found.radius[0])
  assert all(
    found.covers({"a": r, "b": joint - r})[0] for r in range(joint + 1)
  )
  splits = [{"a": r, "b": joint + 1 - r} for r in range(joint + 2)]
  assert not all(found.covers(split)[0] for split in splits)


def test_no_set_of_changed_elements_inside_the_radius_turns_the_vote():
  """All attacks on a small input, the smoothed class exactly enumerated."""
  number, kept = 9, 3
  batch = {"inputs": {"a": np.ones((1, number), np.float32)}}
  batch["inputs"]["a"][0, :1] = -1
  noise = smoothing.subsample(keep={"a": kept})
  found = smoothing.certify(majority, batch, noise, KEY, num_estimation=5000)
  most = int(found.radius[0])
  assert most >= 1

  def exact(x):
    import itertools

    picks = itertools.combinations(range(number), kept)
    return np.mean([np.sum(x[list(pick)]) > 0 for pick in picks])

  # Turning positives to negatives is the worst change of a majority.
  for r in range(number):
    x = batch["inputs"]["a"][0].copy()
    x[1 : 1 + r] = -1
    if r <= most:
      assert exact(x) > 0.5
  x[1:] = -1
  assert exact(x) < 0.5


def test_mixed_noise_gives_both_kinds_of_budget():
  noise = smoothing.mixed(sigma={"b": 0.5}, keep={"a": 2})
  found = certificate(noise=noise)
  alone = found.modality_radius
  p = float(found.p_lower[0])
  assert alone["b"][0] == pytest.approx(0.5 * bounds.reach(p), rel=1e-6)
  assert float(alone["a"][0]).is_integer()
  q, moved = smoothing.overlap(12, 2, 2)
  rho = bounds.reach(p, q[2], moved[2])
  assert found.covers({"a": 2, "b": 0.5 * rho * 0.999})[0]
  assert not found.covers({"a": 2, "b": 0.5 * rho * 1.001})[0]
  with pytest.raises(ValueError, match="radius"):
    _ = found.radius
  with pytest.raises(ValueError, match=r"budgets\['a'\] must be whole"):
    found.covers({"a": 1.5})


def test_gaussian_noise_on_tokens_is_refused_and_sub_sampling_is_not():
  batch = {"inputs": {"words": np.ones((1, 6), np.int32)}}

  def predict(inputs, present):
    del present
    total = jnp.sum(inputs["words"], axis=-1).astype(jnp.float32)
    return jnp.stack([total, -total], axis=-1)

  with pytest.raises(ValueError, match=r"sigma.*'words'.*integers"):
    smoothing.certify(predict, batch, smoothing.gaussian(sigma=1.0), KEY)
  noise = smoothing.subsample(keep={"words": 1})
  found = smoothing.certify(predict, batch, noise, KEY, num_estimation=500)
  assert found.prediction.tolist() == [0]
  assert found.radius[0] == 2


@pytest.mark.parametrize(
  "options, words",
  [
    ({"keep": {}}, "keep"),
    ({"keep": {"a": 0}}, r"keep\['a'\]"),
    ({"keep": {"a": 1}, "axes": {"b": (0,)}}, "axes names"),
    ({"keep": {"a": 1}, "mask_channel": ("b",)}, "mask_channel names"),
    ({"keep": {"a": 1}, "fill": float("nan")}, "fill"),
  ],
)
def test_bad_argument_is_named(options, words):
  with pytest.raises(ValueError, match=words):
    smoothing.subsample(**options)


def test_modality_named_twice_is_refused():
  with pytest.raises(ValueError, match="both name the modality 'a'"):
    smoothing.mixed(sigma={"a": 1.0}, keep={"a": 1})
  with pytest.raises(ValueError, match="sigma or keep"):
    smoothing.from_settings(("a",), sigma=0.0)


def test_settings_are_in_units():
  noise = smoothing.from_settings(
    ("a", "b", "c"), sigma=0.25, keep={"c": 2}, units={"a": 8.0}
  )
  assert noise.deviation("a") == 2.0
  assert noise.deviation("b") == 0.25
  assert noise.deviation("c") == 0
  assert noise.kept("c") == 2


def test_gaussian_noise_is_float32_for_a_coarser_input():
  inputs = {"a": jnp.zeros((200, 50), jnp.bfloat16)}
  seen = smoothing.apply(smoothing.gaussian(sigma=1.0), KEY, inputs)["a"]
  assert seen.dtype == jnp.float32
  assert len(np.unique(seen)) > 9_900
