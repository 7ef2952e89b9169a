"""What each modality is worth: the loss without it."""

from collections.abc import Callable
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float

from robust_mm import _validate
from robust_mm._types import Batch
from robust_mm._types import Params
from robust_mm.modalities.presence import mask
from robust_mm.modalities.presence import without
from robust_mm.modalities.sets import names

GAINS = ("hinge", "squared")


def leave_one_out(
  loss_fn: Callable[[Params, Batch], Array], params: Params, batch: Batch
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  r"""The loss of a batch, and the loss without each modality in turn.

  All of them in one vectorised evaluation, without gradients. Ask for it on a
  held-out batch, in evaluation mode.

  >>> def loss_fn(params, batch):
  ...   return sum(jnp.mean(x) for x in batch["inputs"].values())
  >>> batch = {
  ...   "inputs": {"a": jnp.full((2, 1), 3.0), "b": jnp.full((2, 1), 5.0)},
  ...   "present": {"a": jnp.ones(2, bool), "b": jnp.ones(2, bool)},
  ... }
  >>> full, left_out = leave_one_out(loss_fn, None, batch)
  >>> float(full), {m: float(loss) for m, loss in left_out.items()}
  (8.0, {'a': 5.0, 'b': 3.0})

  Args:
    loss_fn: ``loss_fn(params, batch) -> scalar``.
    params: handed to it.
    batch: ``inputs`` and ``present``, and what else the loss reads.

  Returns:
    ``(full, {m: loss without m})``; an example that has only m keeps it.

  Raises:
    ValueError: naming ``batch`` if it has fewer than two modalities.
  """
  ordered = names(batch["inputs"])
  if len(ordered) < 2:
    raise ValueError(
      f"batch must have at least two modalities, got {', '.join(ordered)}."
    )
  every = [batch["present"]]
  every += [without(batch, name)["present"] for name in ordered]
  every = [{name: one[name] for name in ordered} for one in every]
  stacked = jax.tree.map(lambda *flags: jnp.stack(flags), *every)

  def evaluate(present):
    inputs = mask(batch["inputs"], present)
    return loss_fn(params, {**batch, "present": present, "inputs": inputs})

  found = jax.lax.stop_gradient(jax.vmap(evaluate)(stacked))
  return found[0], {name: found[i + 1] for i, name in enumerate(ordered)}


def information_gain(
  full: float | Array,
  left_out: Mapping[str, float | Array],
  *,
  mode: str = "hinge",
) -> dict[str, Array]:
  r"""How much a loss rises without each modality.

  .. math:: G_m = \max(0, \ell_{-m} - \ell) \quad \text{(hinge)}, \qquad
            I_m = (\ell_{-m} - \ell)^2 \quad \text{(squared)}

  Neither is a conditional mutual information or a causal effect: it is what
  *this* model predicts worse. The squared form, as published, also rewards a
  modality whose removal improves the loss.

  >>> gains = information_gain(1.0, {"helps": 1.5, "harms": 0.5})
  >>> {m: float(gain) for m, gain in gains.items()}
  {'helps': 0.5, 'harms': 0.0}

  Args:
    full: the loss with everything, as :func:`leave_one_out` gives it.
    left_out: ``{m: loss without m}``.
    mode: ``"hinge"`` or ``"squared"``.

  Returns:
    ``{m: gain}``, non-negative; a NaN stays one, and has reward 0 in
    ``controllers.scale_gains``.
  """
  _validate.one_of(GAINS, mode=mode)
  rise = {name: jnp.asarray(loss) - full for name, loss in left_out.items()}
  if mode == "squared":
    return {name: jnp.square(value) for name, value in rise.items()}
  return {name: jnp.maximum(value, 0) for name, value in rise.items()}
