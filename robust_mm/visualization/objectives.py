r"""What is maximised, of logits ``[..., k]`` and a class ``[...]``.

- ``margin``: :math:`z_c - \log \sum_{k \ne c} e^{z_k}`, class c and no other.
- ``logit``: :math:`z_c`, which can grow together with all rivals.
- ``log_prob``: :math:`\log \mathrm{softmax}(z)_c`, which saturates once the
  class is nearly certain; regularisers then win and the picture fades.
"""

import jax
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from robust_mm import _validate
from robust_mm import margins

OBJECTIVES = ("margin", "logit", "log_prob")


def objective(
  name: str, logits: Float[Array, "*b k"], label: Int[Array, "*b"]
) -> Float[Array, "*b"]:
  """The objective of that name.

  >>> import jax.numpy as jnp
  >>> objective("margin", jnp.array([2.0, 0.0]), jnp.array(0)).item()
  2.0
  """
  _validate.one_of(OBJECTIVES, objective=name)
  if name == "margin":
    rivals = margins.pairwise(logits, label)
    return margins.smooth_smallest(rivals, temperature=1.0)
  if name == "log_prob":
    logits = jax.nn.log_softmax(logits)
  chosen = margins.one_hot(label, logits.shape[-1])
  return margins.pick(logits, chosen)[..., 0]
