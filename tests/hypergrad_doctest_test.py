"""The examples in the docstrings are right."""

import doctest
import importlib
import pkgutil

import jax
import jax.numpy as jnp
import optax
import pytest

from robust_mm import hypergrad

NAMES = sorted(m.name for m in pkgutil.iter_modules(hypergrad.__path__))


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_right(name):
  module = importlib.import_module(f"robust_mm.hypergrad.{name}")
  known = {**vars(hypergrad), **vars(module)}
  known |= {"jax": jax, "jnp": jnp, "optax": optax}
  runner = doctest.DocTestRunner()
  for example in doctest.DocTestFinder().find(module, globs=known):
    runner.run(example)
  assert runner.failures == 0
