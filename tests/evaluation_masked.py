"""Models that hide their gradient, and what the masking report says."""

import dataclasses

import evaluation_models as toy
import jax
import jax.numpy as jnp

from robust_mm import evaluation

RADIUS = 0.4
CHECKS = {
  "conclusive",
  "gradients_exist",
  "reaches_chance",
  "falls_with_radius",
  "many_steps_beat_one",
  "gradients_beat_queries",
  "attack_beats_noise",
  "margin_ignores_scale",
  "cross_entropy_unsaturated",
}


def changed(*, inputs=lambda x: x, logits=lambda z: z):
  """The linear model, its inputs or its logits passed through a function."""
  model = toy.linear_model()

  def encode(params, state, given, present, **options):
    given = {m: inputs(x) for m, x in given.items()}
    return model.encode(params, state, given, present, **options)

  def fuse(params, embeddings, present):
    outputs = model.fuse(params, embeddings, present)
    return dataclasses.replace(outputs, logits=logits(outputs.logits))

  return dataclasses.replace(model, encode=encode, fuse=fuse, geometry=None)


def rounded(x):
  """In steps: no slope anywhere."""
  return jnp.round(32 * x) / 32


def report(model, size=60, **arguments):
  """Of so many examples."""
  params, _ = model.init(jax.random.key(0))
  batch = toy.make_batch(size)
  arguments = {"radius": RADIUS, **arguments}
  return evaluation.masking_report(model, params, batch, **arguments)


def failed(found):
  """The names of the checks that did not pass."""
  return {check["name"] for check in found["checks"] if not check["passed"]}


def surrogate():
  """The honest twin."""
  model = toy.linear_model()
  return evaluation.Surrogate(
    model=model, params=model.init(jax.random.key(0))[0]
  )
