"""Small hand-written models that keep the contract, for certification tests."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from robust_mm import _types


def late_fusion(encode_one, lipschitz, *, modalities, num_classes, mixed=False):
  """A model with ``head/{m}`` [k, d], ``bias`` and per-modality encoders.

  With ``factors`` in the parameters the head rows are ``factors * head``.
  """

  def encode(params, state, inputs, present, *, train=False, key=None):
    del train, key
    embeddings = {
      m: jnp.where(
        present[m][..., None],
        encode_one(params, m, inputs[m]),
        0.0,
      )
      for m in modalities
    }
    return embeddings, state

  def fuse(params, embeddings, present):
    scores = {
      m: jnp.where(
        present[m][..., None], embeddings[m] @ params["head"][m].T, 0.0
      )
      for m in modalities
    }
    terms = scores
    if "factors" in params:
      terms = {
        m: scores[m] * jnp.broadcast_to(params["factors"][m], scores[m].shape)
        for m in modalities
      }
    total = sum(terms.values())
    logits = total + jnp.broadcast_to(params["bias"], total.shape)
    return _types.Outputs(
      logits=logits, scores=scores, embeddings=embeddings, mixed=mixed
    )

  def geometry(params):
    factors = params.get("factors")
    head = params["head"]
    if factors is not None:
      head = {m: factors[m][:, None] * head[m] for m in head}
    return _types.Geometry(
      head=head,
      bias=params["bias"],
      lipschitz=lipschitz(params),
      factors=factors,
    )

  return _types.Model(
    modalities=modalities,
    num_classes=num_classes,
    init=lambda key: (None, {}),
    encode=encode,
    fuse=fuse,
    geometry=geometry,
  )


def identity(modalities=("audio", "image"), num_classes=4):
  """Embeddings are the inputs, constants are 1: every radius is exact."""
  return late_fusion(
    lambda params, m, x: x,
    lambda params: dict.fromkeys(modalities, 1.0),
    modalities=modalities,
    num_classes=num_classes,
  )


def mlp(modalities=("audio", "image"), num_classes=4, constants=True):
  """Dense, ReLU, dense; constants are products of exact spectral norms."""

  def encode_one(params, m, x):
    hidden = jax.nn.relu(x @ params["first"][m])
    return hidden @ params["second"][m]

  def lipschitz(params):
    if not constants:
      return dict.fromkeys(modalities)
    return {
      m: jnp.linalg.norm(params["first"][m], 2)
      * jnp.linalg.norm(params["second"][m], 2)
      for m in modalities
    }

  return late_fusion(
    encode_one, lipschitz, modalities=modalities, num_classes=num_classes
  )


def random_params(
  seed, *, modalities=("audio", "image"), sizes=(5, 7), num_classes=4, width=6
):
  """Parameters for ``identity`` (uses the head only if width is None)."""
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  embedding = {
    m: size if width is None else width for m, size in zip(modalities, sizes)
  }
  params = {
    "head": {m: normal(num_classes, embedding[m]) for m in modalities},
    "bias": normal(num_classes) * 0.1,
  }
  if width is not None:
    params["first"] = {
      m: normal(size, 8) / np.sqrt(size) for m, size in zip(modalities, sizes)
    }
    params["second"] = {m: normal(8, width) / np.sqrt(8) for m in modalities}
  return params


def random_batch(
  seed, size, *, modalities=("audio", "image"), sizes=(5, 7), absent=0.0
):
  """Inputs and presence; labels and ids are left out on purpose."""
  rng = np.random.default_rng(seed)
  present = {m: jnp.asarray(rng.random(size) >= absent) for m in modalities}
  inputs = {
    m: jnp.asarray(rng.normal(size=(size, d)), jnp.float32)
    for m, d in zip(modalities, sizes)
  }
  return {"inputs": inputs, "present": present}


def fit(loss_fn, init, tx, *, num_steps, num_seeds=None):
  """Parameters after full-batch steps down ``loss_fn(params)``, of key 0.

  With ``num_seeds`` those of as many keys, along a leading axis.
  """

  def step(carry, _):
    params, state = carry
    updates, state = tx.update(jax.grad(loss_fn)(params), state)
    return (optax.apply_updates(params, updates), state), None

  @jax.jit
  def run(key):
    params = init(key)[0]
    return jax.lax.scan(step, (params, tx.init(params)), length=num_steps)[0][0]

  if num_seeds is None:
    return run(jax.random.key(0))
  return jax.vmap(run)(jax.random.split(jax.random.key(0), num_seeds))
