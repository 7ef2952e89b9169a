"""Bilevel problems with dense derivatives, for the hyper-gradient tests."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree


def load(shared_path, name):
  path = shared_path / "reference" / "hypergradients" / f"{name}.npz"
  with np.load(path, allow_pickle=False) as file:
    return dict(file)


def stored_ridge(stored, dtype):
  """``inner, outer, theta, phi`` of the reference file."""
  X, y, Xv, yv = (
    jnp.asarray(stored[key], dtype)
    for key in (
      "inputs_train",
      "targets_train",
      "inputs_validation",
      "targets_validation",
    )
  )

  def inner(theta, phi):
    penalty = jnp.sum(jnp.exp(phi) * theta**2)
    return 0.5 * jnp.mean((X @ theta - y) ** 2) + 0.5 * penalty

  def outer(theta, phi):
    del phi
    return 0.5 * jnp.mean((Xv @ theta - yv) ** 2)

  theta, phi = stored["theta"], stored["log_penalty"]
  return inner, outer, jnp.asarray(theta, dtype), jnp.asarray(phi, dtype)


def stored_mlp(stored, dtype, prefix=""):
  X, Xv = (
    jnp.asarray(stored[key], dtype)
    for key in ("inputs_train", "inputs_validation")
  )
  y, yv = stored["labels_train"], stored["labels_validation"]

  def errors(theta, inputs, labels):
    hidden = inputs @ theta["dense_0"]["kernel"]
    hidden = jnp.tanh(hidden + theta["dense_0"]["bias"][None])
    logits = hidden @ theta["dense_1"]["kernel"]
    logits = logits + theta["dense_1"]["bias"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

  def inner(theta, phi):
    weights = jnp.exp(phi["log_class_weight"])[y]
    penalties = [jnp.sum(leaf**2) for leaf in jax.tree.leaves(theta)]
    penalty = jnp.sum(jnp.exp(phi["log_penalty"]) * jnp.stack(penalties))
    return jnp.mean(weights * errors(theta, X, y)) + 0.5 * penalty

  def outer(theta, phi):
    penalty = 0.005 * jnp.sum(phi["log_penalty"] ** 2)
    return jnp.mean(errors(theta, Xv, yv)) + penalty

  theta = {
    layer: {
      name: jnp.asarray(stored[f"{prefix}params/{layer}/{name}"], dtype)
      for name in ("bias", "kernel")
    }
    for layer in ("dense_0", "dense_1")
  }
  phi = {
    name: jnp.asarray(stored[f"hyperparams/{name}"], dtype)
    for name in ("log_class_weight", "log_penalty")
  }
  return inner, outer, theta, phi


def weighted_ridge(seed=0, size=12, dtype=jnp.float32):
  """Penalties and softmax data weights together, and the direct term.

  Returns ``inner, outer, solve(phi) -> theta, phi``; theta is a dict.
  """
  rng = np.random.default_rng(seed)
  X, Xv = rng.normal(size=(2, 40, size))
  truth = rng.normal(size=size)
  y = X @ truth + 0.5 * rng.normal(size=40)
  yv = Xv @ truth
  X, y, Xv, yv = (jnp.asarray(a, dtype) for a in (X, y, Xv, yv))
  half = size // 2

  def flat(theta):
    return jnp.concatenate([theta["a"], theta["b"]])

  def inner(theta, phi):
    w = flat(theta)
    weights = jax.nn.softmax(phi["data"])
    penalty = jnp.sum(jnp.exp(phi["log_penalty"]) * w**2)
    return 0.5 * jnp.sum(weights * (X @ w - y) ** 2) + 0.5 * penalty

  def outer(theta, phi):
    direct = 0.01 * jnp.sum(phi["log_penalty"] ** 2)
    return 0.5 * jnp.mean((Xv @ flat(theta) - yv) ** 2) + direct

  def solve(phi):
    weights = jax.nn.softmax(phi["data"])
    H = X.T @ (weights[:, None] * X) + jnp.diag(jnp.exp(phi["log_penalty"]))
    w = jnp.linalg.solve(H, X.T @ (weights * y))
    return {"a": w[:half], "b": w[half:]}

  phi = {
    "data": jnp.asarray(0.3 * rng.normal(size=40), dtype),
    "log_penalty": jnp.asarray(rng.normal(size=size) - 2, dtype),
  }
  return inner, outer, solve, phi


def closed_form(outer, solve, phi):
  """The gradient of the outer loss through the solution itself."""
  return jax.grad(lambda f: outer(solve(f), f))(phi)


def quadratic(matrix, mixed, v, d):
  """``inner, outer`` with these derivatives at theta = phi = 0."""
  matrix, mixed, v, d = (jnp.asarray(a) for a in (matrix, mixed, v, d))

  def inner(theta, phi):
    return 0.5 * theta @ (matrix @ theta) + theta @ (mixed @ phi)

  def outer(theta, phi):
    return v @ theta + d @ phi

  return inner, outer, jnp.zeros_like(v), jnp.zeros_like(d)


def symmetric(rng, values):
  """A matrix with these eigenvalues, and its eigenvectors."""
  size = len(values)
  Q, _ = np.linalg.qr(rng.normal(size=(size, size)))
  return (Q * np.asarray(values)) @ Q.T, Q


def small_quadratic(seed=0, size=8, num_phi=2, low=0.2):
  """``inner, outer, theta, phi`` with eigenvalues from ``low`` to 2."""
  rng = np.random.default_rng(seed)
  H, _ = symmetric(rng, np.linspace(low, 2, size))
  v, d = rng.normal(size=size), rng.normal(size=num_phi)
  arrays = H, rng.normal(size=(size, num_phi)), v, d
  return quadratic(*(jnp.asarray(a, jnp.float32) for a in arrays))


def cosine(left, right):
  left, right = ravel_pytree(left)[0], ravel_pytree(right)[0]
  product = jnp.linalg.norm(left) * jnp.linalg.norm(right)
  return float(left @ right / product)


def relative_error(found, exact):
  found, exact = ravel_pytree(found)[0], ravel_pytree(exact)[0]
  return float(jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact))
