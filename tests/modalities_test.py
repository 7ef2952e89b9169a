"""Subsets, masks and random presence."""

import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from robust_mm import modalities

NAMES = st.lists(
  st.text("abcdef", min_size=1, max_size=3), min_size=1, max_size=5, unique=True
)


@hypothesis.given(NAMES)
def test_subsets_are_all_of_them_once_and_small_ones_first(names):
  subsets = modalities.subsets(names)
  assert len(subsets) == 2 ** len(names) - 1
  assert len(set(subsets)) == len(subsets)
  sizes = [len(subset) for subset in subsets]
  assert sizes == sorted(sizes)
  assert all(subset == tuple(sorted(subset)) for subset in subsets)


@hypothesis.given(NAMES)
def test_names_do_not_depend_on_insertion_order(names):
  for order in itertools.islice(itertools.permutations(names), 6):
    mapping = {name: jnp.full((2,), len(name)) for name in order}
    assert modalities.names(mapping) == tuple(sorted(names))
    stacked = modalities.stack(mapping)
    expected = [[len(n)] * 2 for n in sorted(names)]
    np.testing.assert_array_equal(stacked, expected)


def _batch(present):
  present = {k: jnp.asarray(v) for k, v in present.items()}
  inputs = {
    name: jnp.arange(float(flag.shape[0] * 2)).reshape(-1, 2) + 1
    for name, flag in present.items()
  }
  return {"inputs": inputs, "present": present}


def test_restrict_keeps_the_subset_and_zeroes_the_rest():
  batch = _batch({"a": [True, False], "b": [True, True]})
  out = modalities.restrict(batch, ["a"])
  np.testing.assert_array_equal(out["present"]["a"], [True, False])
  assert not np.any(out["present"]["b"])
  assert not np.any(out["inputs"]["b"])
  np.testing.assert_array_equal(out["inputs"]["a"], [[1, 2], [0, 0]])


def test_stagger_pairs_each_modality_with_a_later_example():
  rows = np.arange(4)
  batch = {
    "inputs": {m: 10 * i + rows for i, m in enumerate("abc")},
    "present": {m: rows > i for i, m in enumerate("abc")},
    "label": rows,
  }
  made = modalities.stagger(batch)
  np.testing.assert_array_equal(made["label"], rows)
  for i, m in enumerate("abc"):
    shifted = (rows - i) % 4
    np.testing.assert_array_equal(made["inputs"][m], 10 * i + shifted)
    np.testing.assert_array_equal(made["present"][m], shifted > i)
    np.testing.assert_array_equal(made["classes"][m], shifted)
  same = modalities.stagger(batch, 0)
  for m in "abc":
    np.testing.assert_array_equal(same["inputs"][m], batch["inputs"][m])
    np.testing.assert_array_equal(same["classes"][m], rows)


def test_restrict_names_the_unknown_modality():
  with pytest.raises(ValueError, match=r"unknown modality 'aa'.*Did you mean"):
    modalities.restrict(_batch({"a": [True]}), ["aa"])


def test_mask_stops_nan_and_its_gradient():
  present = {"a": jnp.array([True, False])}

  def total(x):
    return jnp.sum(modalities.mask({"a": x}, present)["a"] ** 2)

  x = jnp.array([[1.0, 2.0], [jnp.nan, jnp.inf]])
  value, gradient = jax.value_and_grad(total)(x)
  assert value == 5
  np.testing.assert_array_equal(gradient, [[2, 4], [0, 0]])


def test_random_presence_is_uniform_over_subsets_of_what_is_there():
  size = 7000
  present = {
    "a": jnp.ones(size, bool),
    "b": jnp.arange(size) % 2 == 0,
    "c": jnp.ones(size, bool),
  }
  out = modalities.random_presence(jax.random.key(0), present)
  matrix = np.stack([out[name] for name in "abc"], axis=1)
  has = np.stack([present[name] for name in "abc"], axis=1)
  assert np.all(matrix.any(axis=1))
  assert not np.any(matrix & ~has)
  code = matrix @ np.array([1, 2, 4])
  full = np.bincount(code[::2], minlength=8)[1:] / (size / 2)
  np.testing.assert_allclose(full, 1 / 7, atol=0.025)
  two = np.bincount(code[1::2], minlength=8) / (size / 2)
  np.testing.assert_allclose(two[[1, 4, 5]], 1 / 3, atol=0.035)


def test_random_presence_keeps_none_where_there_is_none():
  present = {"a": jnp.array([False]), "b": jnp.array([False])}
  out = modalities.random_presence(jax.random.key(0), present)
  assert not np.any(out["a"])
  assert not np.any(out["b"])
