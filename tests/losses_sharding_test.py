"""Penalties of a batch that lies on eight devices are those of one device."""

import jax
import jax.numpy as jnp
import losses_penalties as helpers
import numpy as np
import pytest

from robust_mm import losses

ITEMS, TOKENS, C = 16, 3, helpers.C
PENALTIES = {
  **{name: {} for name in ("complement_kl", "wrong_class_dispersion")},
  "topk_level": {"window": (0, 3)},
  "parts": {"window": (0, 3), "level_scope": 4},
}


@pytest.fixture(scope="module")
def mesh():
  if jax.device_count() < 8:
    pytest.skip("needs 8 devices")
  return jax.make_mesh(
    (8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )


def loss_of(name, fidelity):
  made = "topk_level" if name == "parts" else name
  penalty = losses.penalty(made, **PENALTIES[name])
  return losses.restrained_softmax(penalty, 0.7, fidelity=fidelity)


@pytest.mark.parametrize(
  "name, fidelity",
  [
    *((name, None) for name in PENALTIES),
    ("topk_level", "published"),
    ("parts", "published"),
  ],
)
@pytest.mark.parametrize("tokens", [False, True])
def test_a_sharded_batch_has_the_loss_of_a_whole_one(
  mesh, name, fidelity, tokens
):
  """Of every device's items together, with valid ones unevenly spread."""
  rng = np.random.default_rng(11)
  shape = (ITEMS, TOKENS) if tokens else (ITEMS,)
  logits = rng.normal(size=(*shape, C)).astype(np.float32)
  label = rng.integers(0, C, shape)
  valid = np.broadcast_to(
    (np.arange(ITEMS) % 5 > 0).reshape(-1, *[1] * (len(shape) - 1)), shape
  )
  loss_fn = loss_of(name, fidelity)
  grad_fn = helpers.jit(jax.value_and_grad(loss_fn, has_aux=True))
  data = jax.sharding.NamedSharding(mesh, jax.P("data"))
  spread = [jax.device_put(x, data) for x in (logits, label, valid)]
  (loss, aux), grad = grad_fn(*spread)
  (expected, whole), slope = on_one_device(loss_fn, logits, label, valid)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  np.testing.assert_allclose(grad, slope, atol=1e-6)
  assert len(grad.sharding.device_set) == 8
  for key in whole:
    np.testing.assert_allclose(
      aux[key], whole[key], rtol=1e-4, atol=1e-6, err_msg=key
    )
  # Nor is it what each device would have found by itself.
  if name == "topk_level":
    step = ITEMS // 8
    alone = [
      loss_fn(
        jnp.asarray(logits[i : i + step]),
        label[i : i + step],
        valid_weights=np.ones_like(valid[i : i + step], np.float32),
      )[1]["penalty"]
      for i in range(0, ITEMS, step)
    ]
    assert abs(np.mean(alone) - whole["penalty"]) > 1e-3


def on_one_device(loss_fn, logits, label, valid):
  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
  return grad_fn(jnp.asarray(logits), label, valid)
