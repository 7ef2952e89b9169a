import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_mm import _extremes
from robust_mm import lipschitz
from robust_mm import margins
from robust_mm.attacks import losses

FEW = "jax_disable_most_optimizations"


@pytest.fixture(params=[False, True], ids=["default", "few optimisations"])
def _compiled(request):
  before = jax.config.read(FEW)
  jax.clear_caches()
  jax.config.update(FEW, request.param)
  yield
  jax.clear_caches()
  jax.config.update(FEW, before)


def _normalised(x, scale, bias):
  """A product and a sum, which XLA may round together or one by one."""
  mean = jnp.mean(x, axis=-1, keepdims=True)
  variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True) - mean**2
  return (x - mean) * (jax.lax.rsqrt(variance + 1e-6) * scale) + bias


def _given(num_classes):
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = (32, num_classes), (1, num_classes), (1, num_classes)
  return [jax.random.normal(k, s) for k, s in zip(keys, shapes)]


def _label(rows):
  return jnp.arange(rows.shape[0]) % rows.shape[-1]


USES = {
  "largest": _extremes.largest,
  "smallest": _extremes.smallest,
  "hard margin": lambda x: margins.smallest(margins.pairwise(x, _label(x))),
  "shortfall": lambda x: margins.hard_shortfall(x, target=0.3),
  "radii": lambda x: margins.radii(x + 3),
  "l1 ball": lambda x: margins.joint_sensitivity(
    dict(zip("ab", jnp.split(jnp.abs(x), 2, axis=-1))), ball="l1"
  ).sum(-1),
  "attack": lambda x: losses.margin(x, _label(x)),
  "layer norm": lambda x: jax.vmap(lipschitz.layer_norm)(x),
}


@pytest.mark.usefixtures("_compiled")
@pytest.mark.parametrize("name", USES)
@pytest.mark.parametrize("num_classes", [4, 10, 64])
def test_gradients_are_finite_however_it_is_compiled(name, num_classes):
  given = _given(num_classes)

  def total(*given):
    return jnp.sum(jnp.sin(USES[name](_normalised(*given))))

  for found in jax.jit(jax.grad(total, (0, 1, 2)))(*given):
    assert jnp.all(jnp.isfinite(found))
    assert jnp.any(found != 0)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_values_and_the_first_of_equals(axis):
  x = jax.random.normal(jax.random.key(1), (3, 5, 4))
  np.testing.assert_array_equal(_extremes.largest(x, axis), jnp.max(x, axis))
  np.testing.assert_array_equal(_extremes.smallest(x, axis), jnp.min(x, axis))
  grad = jax.grad(lambda x: jnp.sum(_extremes.largest(x, axis)))
  expected = jax.grad(lambda x: jnp.sum(jnp.max(x, axis)))
  np.testing.assert_array_equal(grad(x), expected(x))
  first = np.moveaxis(np.asarray(grad(jnp.ones((3, 5, 4)))), axis, 0)
  np.testing.assert_array_equal(first[0], 1)
  np.testing.assert_array_equal(first[1:], 0)


def test_infinite_and_undefined_entries():
  x = jnp.array([[-jnp.inf, 2.0], [jnp.inf, 1.0], [jnp.nan, 1.0]])
  np.testing.assert_array_equal(_extremes.largest(x), jnp.max(x, axis=-1))
  np.testing.assert_array_equal(_extremes.smallest(x), jnp.min(x, axis=-1))
  nothing = jnp.full((2, 3), -jnp.inf)
  np.testing.assert_array_equal(_extremes.largest(nothing), [-jnp.inf] * 2)
