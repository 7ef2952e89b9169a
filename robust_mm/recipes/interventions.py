"""What happens to a batch before the loss sees it, inside the jitted step.

Each factory returns ``fn(key, params, state, batch) -> batch``. No gradient
flows through it; the model, where one is used, is in evaluation mode.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from robust_mm import _validate
from robust_mm import modalities
from robust_mm import smoothing
from robust_mm._types import Model


def modality_dropout(*, rate: float = 1.0) -> Callable[..., Any]:
  """Keeps a random non-empty subset of each example's modalities.

  Args:
    rate: chance that an example is touched at all; of those, every non-empty
      subset of the modalities it has (all of them included) is equally likely.

  Raises:
    ValueError: ``rate`` outside [0, 1].
  """
  _validate.in_unit_interval(rate=rate)

  def intervene(key, params, state, batch):
    del params, state
    subset_key, touch_key = jax.random.split(key)
    chosen = modalities.random_presence(subset_key, batch["present"])
    touched = jax.random.bernoulli(touch_key, rate, batch["label"].shape[:1])
    present = {
      name: jnp.where(touched, chosen[name], flag)
      for name, flag in batch["present"].items()
    }
    inputs = modalities.mask(batch["inputs"], present)
    return {**batch, "present": present, "inputs": inputs}

  return intervene


def two_views(augment: Callable[..., Any]) -> Callable[..., Any]:
  """Two independent draws of an augmentation: ``second_inputs`` beside."""

  def intervene(key, params, state, batch):
    first, second = jax.random.split(key)
    other = augment(second, params, state, batch)
    batch = augment(first, params, state, batch)
    return {**batch, "second_inputs": other["inputs"]}

  return intervene


def mixup(*, alpha: float = 1.0) -> Callable[..., Any]:
  r"""Mixes every example with another: :math:`\lambda x + (1 - \lambda) x'`.

  One :math:`\lambda \sim Beta(\alpha, \alpha)` and one permutation per batch,
  shared by all modalities. A modality takes part only where both examples have
  it. Adds ``other_label`` [b] and ``mix`` [] to the batch.

  Raises:
    ValueError: ``alpha`` not positive, or (when traced) an integer modality.
  """
  _validate.positive(alpha=alpha)

  def intervene(key, params, state, batch):
    del params, state
    mix_key, order_key = jax.random.split(key)
    mix = jax.random.beta(mix_key, alpha, alpha)
    order = jax.random.permutation(order_key, batch["label"].shape[0])
    present = {n: f & f[order] for n, f in batch["present"].items()}
    inputs = {}
    for name, value in batch["inputs"].items():
      if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
          f"mixup cannot mix the integer modality {name!r}; leave it out of "
          f"data.modalities or choose another variant."
        )
      weight = mix.astype(value.dtype)
      inputs[name] = weight * value + (1 - weight) * value[order]
    return {
      **batch,
      "inputs": modalities.mask(inputs, present),
      "present": present,
      "other_label": batch["label"][order],
      "mix": mix,
    }

  return intervene


def adversarial(model: Model, attack) -> Callable[..., Any]:
  """Replaces the inputs by adversarial ones, model in evaluation mode.

  Args:
    model: the model under attack.
    attack: a value of ``robust_mm.attacks``.
  """

  def intervene(key, params, state, batch):
    def logits_fn(inputs):
      outputs, _ = model.apply(params, state, inputs, batch["present"])
      return outputs.logits

    inputs = attack(
      key, logits_fn, batch["inputs"], batch["label"], present=batch["present"]
    )
    return {**batch, "inputs": jax.lax.stop_gradient(inputs)}

  return intervene


def gaussian_noise(*, sigma: float) -> Callable[..., Any]:
  """Adds white noise of standard deviation ``sigma`` to float modalities."""
  _validate.positive(sigma=sigma)

  def intervene(key, params, state, batch):
    del params, state
    keys = jax.random.split(key, len(batch["inputs"]))
    inputs = dict(batch["inputs"])
    for subkey, name in zip(keys, modalities.names(inputs)):
      value = inputs[name]
      if jnp.issubdtype(value.dtype, jnp.floating):
        noise = jax.random.normal(subkey, value.shape, value.dtype)
        inputs[name] = value + sigma * noise
    return {**batch, "inputs": modalities.mask(inputs, batch["present"])}

  return intervene


def smoothing_noise(noise: smoothing.Noise) -> Callable[..., Any]:
  """The noise that a smoothed classifier will see, drawn once an example.

  Args:
    noise: of ``robust_mm.smoothing``, Gaussian, sub-sampling or mixed.

  Raises:
    ValueError: (when traced) noise that does not fit the inputs.
  """

  def intervene(key, params, state, batch):
    del params, state
    smoothing.check(noise, batch["inputs"])
    inputs = smoothing.apply(noise, key, batch["inputs"])
    return {**batch, "inputs": modalities.mask(inputs, batch["present"])}

  return intervene


def with_clean(intervention: Callable) -> Callable:
  """Keeps the untouched inputs beside the changed ones, as ``clean_inputs``."""

  def intervene(key, params, state, batch):
    changed = intervention(key, params, state, batch)
    return {**changed, "clean_inputs": batch["inputs"]}

  return intervene
