r"""Cross-entropies of every example, to be averaged by the caller."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array
from jaxtyping import Float

from robust_mm import _validate
from robust_mm import margins


def cross_entropy(
  logits: Float[Array, "*b k"], label, *, label_smoothing: float = 0.0
) -> Float[Array, "*b"]:
  r"""Cross-entropy :math:`-\log p_y` of every example, to be averaged.

  With smoothed labels, :math:`-(1 - s) \log p_y - \frac s k \sum_j \log p_j`.

  Args:
    logits: ``[*b, k]``.
    label: int ``[*b]``.
    label_smoothing: s in [0, 1), the share of every label that is spread over
      all classes alike.

  Returns:
    ``[*b]``, per example; two labels of mixup are mixed by the caller.

  Raises:
    ValueError: for a label outside 0..k-1 (where its value is known) or of
      another shape; soft labels go through ``soft_cross_entropy``. For
      ``label_smoothing`` out of range.

  >>> round(float(cross_entropy(jnp.array([0.0, 0.0]), jnp.array(1))), 4)
  0.6931
  """
  num_classes = logits.shape[-1]
  margins.check_label(label, num_classes, logits.shape[:-1])
  _validate.below_one(label_smoothing=label_smoothing)
  if label_smoothing:
    sharp = jax.nn.one_hot(label, num_classes, dtype=logits.dtype)
    target = optax.smooth_labels(sharp, label_smoothing)
    return soft_cross_entropy(logits, target)
  chosen = margins.pick(logits, margins.one_hot(label, num_classes))
  return jax.nn.logsumexp(logits, axis=-1) - jnp.squeeze(chosen, -1)


def binary_cross_entropy(
  logits: Float[Array, "*b k"], label: Array
) -> Float[Array, "*b"]:
  r"""Sigmoid cross-entropy of every example, averaged over classes.

  .. math:: -\frac 1 k \sum_j y_j \log \sigma(z_j)
            + (1 - y_j) \log \sigma(-z_j)

  Finite for any finite logits.

  Args:
    logits: ``[*b, k]``, one a class.
    label: ``[*b, k]``, 0 and 1 (or False and True), any number of ones.

  Raises:
    ValueError: for a label of another shape.

  >>> round(float(binary_cross_entropy(jnp.zeros(3), jnp.array([1, 0, 1]))), 4)
  0.6931
  """
  if jnp.shape(label) != logits.shape:
    raise ValueError(
      f"label must have the shape {logits.shape} of the logits, got "
      f"{jnp.shape(label)}."
    )
  label = jnp.asarray(label).astype(logits.dtype)
  each = optax.losses.sigmoid_binary_cross_entropy(logits, label)
  return jnp.mean(each, axis=-1)


def soft_cross_entropy(
  logits: Float[Array, "*b k"], target: Float[Array, "*b k"]
) -> Float[Array, "*b"]:
  r"""Cross-entropy :math:`-\sum_j t_j \log p_j` of every example.

  Args:
    logits: ``[*b, k]``.
    target: ``[*b, k]``, rows that sum to 1 (mixup, smoothed labels).
  """
  if target.shape != logits.shape:
    raise ValueError(
      f"target must have the shape of logits {logits.shape}, got "
      f"{target.shape}."
    )
  return -jnp.sum(target * jax.nn.log_softmax(logits, axis=-1), axis=-1)
