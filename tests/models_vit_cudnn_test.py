"""Attention of cuDNN against that of XLA.

It runs on GPUs alone (``JAX_PLATFORMS=cuda``); elsewhere a stand-in shows that
the token which makes a length even changes nothing.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_mm.models import vit

on_gpus = pytest.mark.skipif(
  jax.default_backend() != "gpu", reason="cuDNN runs on GPUs alone"
)


def _networks(image_side, **options):
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
      **options,
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


def _run(net, params, images, present):
  """(logits, gradients in parameters and images)."""

  def loss_fn(params, images):
    logits = net.apply(params, images, present)
    return jnp.mean(jnp.square(logits)), logits

  (_, logits), gradient = jax.jit(
    jax.value_and_grad(loss_fn, (0, 1), has_aux=True)
  )(params, images)
  return logits, gradient


ATTENTION = jax.nn.dot_product_attention


def _stand_in(query, key, value, *, mask=None, implementation=None, **lengths):
  """XLA's attention where cuDNN's is asked for, and what that refuses."""
  if implementation == "cudnn":
    assert query.shape[1] % 2 == 0
    assert mask is None or mask.shape[2:] == (query.shape[1],) * 2
  return ATTENTION(query, key, value, mask=mask, **lengths)


@pytest.mark.parametrize("side", [21, 28])
@pytest.mark.parametrize("kind", ["all", "items", "tokens"])
@pytest.mark.parametrize(
  "options", [{}, {"pool": "mean", "remat": "blocks"}, {"remat": "dots"}]
)
def test_a_token_more_changes_nothing(side, kind, options, monkeypatch):
  (cudnn, xla), params, images = _networks(side, **options)
  present = _present(kind, cudnn.num_tokens(images.shape[1:]))
  monkeypatch.setattr(jax.nn, "dot_product_attention", _stand_in)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  ours, gradient = _run(cudnn, params, images, present)
  theirs, expected = _run(xla, params, images, present)
  # Sums of another length may be rounded in another order.
  np.testing.assert_allclose(ours, theirs, atol=0.02 * jnp.abs(theirs).max())
  jax.tree.map(_close, gradient, expected)


def _close(own, other):
  size = float(jnp.linalg.norm(other))
  assert float(jnp.linalg.norm(own - other)) <= 0.05 * size + 1e-6


# With the class token 10 keys and 17.
@on_gpus
@pytest.mark.parametrize("side", [21, 28])
@pytest.mark.parametrize("kind", ["all", "items", "tokens"])
def test_logits_and_gradients_are_those_of_xla(side, kind):
  (cudnn, xla), params, images = _networks(side)
  present = _present(kind, cudnn.num_tokens(images.shape[1:]))

  ours, gradient = _run(cudnn, params, images, present)
  theirs, expected = _run(xla, params, images, present)
  np.testing.assert_allclose(ours, theirs, atol=0.02 * jnp.abs(theirs).max())
  jax.tree.map(_close, gradient, expected)


@on_gpus
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
