"""Attention of cuDNN, which runs on GPUs alone, against that of XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_mm.models import vit

pytestmark = pytest.mark.skipif(
  jax.default_backend() != "gpu", reason="cuDNN runs on GPUs alone"
)


def _networks(image_side):
  """(the same network with either attention, parameters, images)."""
  nets = [
    vit.vision_transformer(
      width=128,
      depth=2,
      num_heads=2,
      patch_size=7,
      num_classes=10,
      dtype="bfloat16",
      implementation=name,
    )
    for name in ("cudnn", "xla")
  ]
  shape = (image_side, image_side, 1)
  params = nets[0].init(jax.random.key(0), shape)
  images = jax.random.uniform(jax.random.key(1), (4, *shape))
  return nets, params, images


def _present(kind, number):
  if kind == "all":
    return None
  if kind == "items":
    return jnp.array([True, False, True, True])
  return jax.random.bernoulli(jax.random.key(2), 0.5, (4, number))


# With the class token 10 keys and 17.
@pytest.mark.parametrize("side", [21, 28])
@pytest.mark.parametrize("kind", ["all", "items", "tokens"])
def test_logits_and_gradients_are_those_of_xla(side, kind):
  (cudnn, xla), params, images = _networks(side)
  present = _present(kind, cudnn.num_tokens(images.shape[1:]))

  def run(net):
    def loss_fn(params, images):
      logits = net.apply(params, images, present)
      return jnp.mean(jnp.square(logits)), logits

    return jax.jit(jax.value_and_grad(loss_fn, (0, 1), has_aux=True))(
      params, images
    )

  (_, ours), gradient = run(cudnn)
  (_, theirs), expected = run(xla)
  scale = float(jnp.max(jnp.abs(theirs)))
  np.testing.assert_allclose(ours, theirs, atol=0.02 * scale)
  for own, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected)):
    size = float(jnp.linalg.norm(other))
    assert float(jnp.linalg.norm(own - other)) <= 0.05 * size + 1e-6


def test_absent_tokens_change_nothing():
  (net, _), params, images = _networks(28)
  present = _present("tokens", 16)
  tokens = net.embed(params, images)

  @jax.jit
  def total(tokens):
    return jnp.sum(net.encode(params, tokens, present)[:, 0])

  junk = jnp.where(present[..., None], tokens, jnp.nan)
  assert total(tokens) == total(junk)
  gradient = jax.grad(total)(tokens)
  assert jnp.all(jnp.where(present[..., None], 0.0, gradient) == 0)
  assert jnp.any(gradient != 0)
