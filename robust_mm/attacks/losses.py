r"""What an attack makes large: one number per example, from its logits.

Every loss is ``loss(logits [b, k], label [b], target=None) -> [b]``; larger is
better for the attacker. With a ``target`` class ``[b]`` it rewards that one
class, without it any wrong class.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from robust_mm import _extremes
from robust_mm import _validate

Label = Int[Array, " b"]
ANY = -1


def margin(
  logits: Float[Array, "b k"], label: Label, target: Label | None = None
) -> Float[Array, " b"]:
  r"""The logit margin of the best wrong class, or of ``target``.

  .. math:: \max_{j \ne y} z_j - z_y \qquad \text{or} \qquad z_t - z_y

  Positive exactly where the label has lost. Its gradient does not vanish when
  the model is confident, so it is the default of every attack.

  >>> margin(jnp.array([[1.0, 4.0, 2.0]]), jnp.array([1])).tolist()
  [-2.0]
  """
  chosen = jax.nn.one_hot(label, logits.shape[-1], dtype=bool)
  rival = _extremes.largest(jnp.where(chosen, -jnp.inf, logits))
  rival = _targeted(rival, logits, target)
  return rival - _pick(logits, label)


def cross_entropy(
  logits: Float[Array, "b k"], label: Label, target: Label | None = None
) -> Float[Array, " b"]:
  r"""Minus the log-probability of the label, or that of ``target``.

  .. math:: -\log p_y \qquad \text{or} \qquad \log p_t

  Its gradient underflows to zero when the margin exceeds about 100 (fp32):
  a model with large logits looks robust to it and is not.
  """
  log_probabilities = jax.nn.log_softmax(logits, axis=-1)
  loss = -_pick(log_probabilities, label)
  return _targeted(loss, log_probabilities, target)


def dlr(
  logits: Float[Array, "b k"], label: Label, target: Label | None = None
) -> Float[Array, " b"]:
  r"""The difference-of-logits ratio: a margin that ignores the logit scale.

  .. math:: \frac{\max_{j \ne y} z_j - z_y}{z_{(1)} - z_{(3)}}
            \qquad \text{or} \qquad
            \frac{z_t - z_y}{z_{(1)} - (z_{(3)} + z_{(4)}) / 2}

  where :math:`z_{(i)}` is the i-th largest logit. Where there is no third
  logit, or with a target no fourth, the loss is the plain :func:`margin`. Where
  the denominator is 0 the numerator is 0 as well unless the label is not among
  the best; it is kept from dividing by zero by a tiny number.

  Its slope in the label's logit is 0 where the two largest wrong logits tie, so
  do not rely on it alone.

  References:
    `Croce & Hein (2020) <https://arxiv.org/abs/2003.01690>`_, eq. (6) and (7).
  """
  num_classes = logits.shape[-1]
  aimed = margin(logits, label, target)
  if num_classes < 3:
    return aimed
  top, _ = jax.lax.top_k(logits, min(num_classes, 4))
  ratio = margin(logits, label) / (top[:, 0] - top[:, 2] + 1e-12)
  if target is None:
    return ratio
  if num_classes > 3:
    aimed = aimed / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)
  return jnp.where(target == ANY, ratio, aimed)


LOSSES = {"margin": margin, "cross_entropy": cross_entropy, "dlr": dlr}


def get(name: str) -> Callable[..., Array]:
  """The loss of that name; ValueError with the known names otherwise."""
  _validate.one_of(LOSSES, loss=name)
  return LOSSES[name]


def _pick(values, label):
  # Not a gather: its gradient is a scatter, slow on every device.
  chosen = jax.nn.one_hot(label, values.shape[-1], dtype=bool)
  return jnp.sum(jnp.where(chosen, values, 0), axis=-1)


def _targeted(untargeted, values, target):
  if target is None:
    return untargeted
  # ANY picks nothing, and is not used.
  aimed = _pick(values, target)
  return jnp.where(target == ANY, untargeted, aimed)
