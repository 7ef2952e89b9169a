r"""What ModalImmune adds up: removal, collapse, reconstruction, expectations.

Shared by its update, its jobs and its tests; everything is a pure function of
parameters and a batch.
"""

import dataclasses
import functools
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_mm import _tasks
from robust_mm import controllers
from robust_mm import corruptions
from robust_mm import modalities
from robust_mm import spectrum
from robust_mm._types import Model
from robust_mm.recipes import decoders as decoders_lib
from robust_mm.recipes import objectives
from robust_mm.recipes import probes as probes_lib
from robust_mm.recipes import restraints

REMOVALS = ("arm", "subset", "every")
COLLAPSED = ("arm", "all")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Settings:
  """The arguments of :func:`modal_immune`, checked and filled in."""

  model: Model
  fidelity: str
  controller: controllers.Controller
  controller_period: int
  warmup_steps: int
  collapse_weight: float
  spectral_weight: float
  clean_weight: float
  attack_weight: float
  label_smoothing: float
  restraint: restraints.Restraint | None
  reconstruction_weight: float
  feedback_weight: float
  damage: corruptions.Mixture | None
  damage_rate: float
  features: Mapping[str, Any]
  removal: str
  consistency_weight: float
  temperature: float
  collapse_on: str
  gaussian_target: str
  adaptive: bool
  gain: str
  gates: bool
  adapt: bool
  outer_period: int
  outer_solver: Callable | None
  damping_ratio: float | None
  guard_tolerance: float | None
  batch_size: int

  @property
  def num_arms(self) -> int:
    """M."""
    return len(self.model.modalities)

  def phi(self) -> dict:
    """The meta-parameters: logarithms of the weights that are not 0."""
    weights = {
      "collapse_weight": self.collapse_weight,
      "spectral_weight": self.spectral_weight,
    }
    return {
      name: jnp.asarray(np.log(value), jnp.float32)
      for name, value in weights.items()
      if value
    }

  def weights(self, phi: Mapping) -> tuple[Any, Any]:
    """(lambda, kappa) of meta-parameters; 0 stays 0."""
    return tuple(
      jnp.exp(phi[name]) if name in phi else jnp.zeros(())
      for name in ("collapse_weight", "spectral_weight")
    )


def logits_of(model: Model, params, embeddings, present):
  """``[b, k]`` from the embeddings of what is present."""
  kept = modalities.mask(embeddings, present)
  return model.fuse(params, kept, present).logits


def task_loss(settings: Settings, params, embeddings, present, label):
  """The task loss of what is present, as it is trained on."""
  return objectives.task_loss(
    settings.model,
    logits_of(settings.model, params, embeddings, present),
    {"label": label, "present": present},
    label_smoothing=settings.label_smoothing,
    restraint=settings.restraint,
  )


def collapse(settings: Settings, embeddings, present, arm, kappa, key):
  """Of the attacked modality, or the mean over all; 0 for an arm beyond.

  All are computed (of d x d numbers) and one is selected: one trace, and, on a
  mesh, no communication inside a branch.
  """
  terms = _every_collapse(
    settings, embeddings, present, kappa, settings.gaussian_target, key
  )
  if settings.collapse_on == "all":
    return jnp.where(arm < len(terms), jnp.mean(terms), 0)
  return jnp.sum(jnp.where(jnp.arange(len(terms)) == arm, terms, 0))


def separable_collapse(settings: Settings, embeddings, present, weights):
  """``lambda * sum over all m of L_col(Z_m)``."""
  collapse_weight, kappa = weights
  if not settings.collapse_weight:
    return jnp.zeros(())
  terms = _every_collapse(settings, embeddings, present, kappa)
  return collapse_weight * jnp.sum(terms)


def _every_collapse(
  settings, embeddings, present, kappa, target="expected", key=None
):
  """``[M]`` losses."""

  def one(embedding, weights, key):
    return spectrum.collapse(
      embedding,
      spectral_weight=kappa,
      target=target,
      key=key,
      weights=weights,
      adaptive=settings.adaptive,
    ).loss

  ordered = modalities.names(embeddings)
  keys = jax.random.split(
    jax.random.key(0) if key is None else key, len(ordered)
  )
  if len({embeddings[name].shape for name in ordered}) == 1:
    # One batched eigendecomposition: compiles M times as fast.
    weights = modalities.stack({name: present[name] for name in ordered})
    return jax.vmap(one)(modalities.stack(embeddings), weights, keys)
  return jnp.stack(
    [one(embeddings[n], present[n], k) for n, k in zip(ordered, keys)]
  )


def expected_loss(settings: Settings, params, phi, batch):
  r"""The inner loss: the expectation of the training loss over arms.

  In evaluation mode, with expected Gaussian targets, of inputs as the pipeline
  gives them: neither damaged nor augmented. ``batch`` has the training
  ``batch``, the model's ``state``, probabilities ``p`` [M] (constants),
  ``decoders`` and ``probes``.
  """
  data, p = batch["batch"], jax.lax.stop_gradient(batch["p"])
  present, label = data["present"], data["label"]
  model = settings.model
  embeddings, _ = model.encode(
    params, batch["state"], data["inputs"], present, train=False
  )
  total = jnp.zeros(())
  if settings.clean_weight:
    clean = task_loss(settings, params, embeddings, present, label)
    total += settings.clean_weight * clean
  left = left_out(present)

  def without(present):
    attacked = task_loss(settings, params, embeddings, present, label)
    if not settings.reconstruction_weight:
      return attacked, jnp.zeros(())
    return attacked, decoders_lib.loss(
      batch["decoders"], settings.features, embeddings, present, data
    )

  attacked, rebuilt = jax.vmap(without)(left)
  attacked = jnp.sum(p * attacked)
  if settings.removal != "arm":
    attacked = mean_over_sets(
      model,
      params,
      embeddings,
      data,
      settings.label_smoothing,
      settings.restraint,
    )
  if settings.consistency_weight:
    every = over_sets(model, params, embeddings, present)
    full = logits_of(model, params, embeddings, present)
    # The teacher is fixed, so the Hessian is that of a function: symmetric.
    total += settings.consistency_weight * disagreement(
      model, *every, full, settings.temperature
    )
  total += settings.attack_weight * attacked
  total += settings.reconstruction_weight * jnp.sum(p * rebuilt)
  collapse_weight, kappa = settings.weights(phi)
  terms = _every_collapse(settings, embeddings, present, kappa)
  if settings.feedback_weight:
    climbed = probes_lib.bounded(batch["probes"], embeddings, present, label)
    total -= settings.feedback_weight * jnp.sum(p * climbed)
  if settings.collapse_on == "all":
    p = jnp.full_like(p, jnp.sum(p) / len(p))
  return total + collapse_weight * jnp.sum(p * terms)


def left_out(present):
  """Presence without each modality in turn, stacked: ``{m: bool[M, b]}``."""
  every = [modalities.removed(present, arm) for arm in range(len(present))]
  return jax.tree.map(lambda *flags: jnp.stack(flags), *every)


def outer_loss(settings: Settings, params, phi, batch):
  """Mean task loss over availability sets, of a validation batch.

  With everything present alone, no weight at all would be best.
  """
  del phi
  data = batch["batch"]
  embeddings, _ = settings.model.encode(
    params, batch["state"], data["inputs"], data["present"], train=False
  )
  return mean_over_sets(settings.model, params, embeddings, data)


def mean_over_sets(
  model: Model,
  params,
  embeddings,
  batch,
  label_smoothing: float = 0.0,
  restraint: restraints.Restraint | None = None,
):
  """Task loss, averaged over availability sets; one pass of the encoders."""
  logits, left = over_sets(model, params, embeddings, batch["present"])
  return loss_over_sets(
    model, logits, left, batch["label"], label_smoothing, restraint
  )


def over_sets(model: Model, params, embeddings, present):
  """``(logits [s, b, k], {m: bool[s, b]})`` of every availability set."""
  left = modalities.left_by_set(present)
  said = jax.vmap(lambda flags: logits_of(model, params, embeddings, flags))
  return said(left), left


def loss_over_sets(
  model: Model,
  logits,
  left,
  label,
  label_smoothing: float = 0.0,
  restraint: restraints.Restraint | None = None,
):
  """Mean over sets of the mean task loss of those who have something left."""
  fn = functools.partial(
    objectives.task_loss, label_smoothing=label_smoothing, restraint=restraint
  )
  return _mean_of_sets(fn, model, logits, left, label)


def score_over_sets(model: Model, logits, left, label):
  """Mean over sets of the accuracy, or MAE, of those with something left."""
  return _mean_of_sets(objectives.score, model, logits, left, label)


def _mean_of_sets(fn, model, logits, left, label):
  def one(logits, present):
    return fn(model, logits, {"label": label, "present": present})

  return jnp.mean(jax.vmap(one)(logits, left))


def disagreement(model: Model, logits, left, full, temperature: float):
  r"""How far predictions from subsets are from that of all modalities.

  .. math:: \tau^2 \operatorname{mean}_s \operatorname{mean}_i
            KL(p_i \,\|\, p_i^s), \qquad p = softmax(z / \tau)

  Of several labels KL is that of each class, there or not, averaged over
  classes, with :math:`p = \sigma(z / \tau)`.
  Of a regression the mean of the squared difference, in deviations of the
  target, without a temperature. The prediction ``full`` [b, k] of everything is
  the teacher: no gradient.
  """
  full = jax.lax.stop_gradient(full)
  if model.task == _tasks.REGRESSION:
    apart = (logits - full[None])[..., 0] / model.target.deviation
    return jnp.mean(jax.vmap(objectives.counted_mean)(apart**2, left))
  if model.task == _tasks.MULTI_LABEL:
    each = _binary_divergence(full[None] / temperature, logits / temperature)
  else:
    target = jax.nn.log_softmax(full / temperature)[None]
    said = jax.nn.log_softmax(logits / temperature)
    each = jnp.sum(jnp.exp(target) * (target - said), axis=-1)
  means = jax.vmap(objectives.counted_mean)(each, left)
  return temperature**2 * jnp.mean(means)


def _binary_divergence(target, said):
  """Mean over classes of KL between coins with these logits."""
  there = jax.nn.log_sigmoid(target) - jax.nn.log_sigmoid(said)
  away = jax.nn.log_sigmoid(-target) - jax.nn.log_sigmoid(-said)
  chance = jax.nn.sigmoid(target)
  return jnp.mean(chance * there + (1 - chance) * away, axis=-1)
