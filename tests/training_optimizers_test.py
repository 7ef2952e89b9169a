"""Optimisers and schedules: against recursions by hand, refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_mm.training import optimizers


def trajectory(tx, gradients, start=1.0):
  """The parameter after each update, [num_steps]."""

  def step(carry, gradient):
    params, state = carry
    updates, state = tx.update(gradient, state, params)
    params = params + updates
    return (params, state), params

  params = jnp.asarray(start)
  _, path = jax.lax.scan(step, (params, tx.init(params)), gradients)
  return np.asarray(path)


def momentum(gradients, rates, *, decay, nesterov=False, start=1.0):
  """SGD whose decay enters the momentum of 0.9, in float64."""
  params, velocity, path = start, 0.0, []
  for gradient, rate in zip(gradients, rates):
    gradient = gradient + decay * params
    velocity = 0.9 * velocity + gradient
    params -= rate * (gradient + 0.9 * velocity if nesterov else velocity)
    path.append(params)
  return np.asarray(path)


GRADIENTS = np.random.default_rng(0).normal(size=60).astype(np.float32)


@pytest.mark.parametrize("name", ["sgd", "nesterov"])
def test_sgd_has_plain_momentum_and_nesterov_its_own(name):
  tx = optimizers.make(
    num_steps=60, name=name, lr=0.01, schedule="constant", weight_decay=0.5
  )
  path = trajectory(tx, jnp.asarray(GRADIENTS))
  for nesterov in (False, True):
    expected = momentum(
      GRADIENTS, np.full(60, 0.01), decay=0.5, nesterov=nesterov
    )
    same = np.allclose(path, expected, rtol=1e-4)
    assert same == (nesterov == (name == "nesterov"))


def test_step_schedule_drops_at_shares_of_the_steps():
  rate = optimizers.make_schedule(
    "step", lr=2.0, num_steps=140, milestones=(60 / 140, 120 / 140)
  )
  rates = jax.vmap(rate)(jnp.arange(140))
  expected = np.repeat([2.0, 0.2, 0.02], [60, 60, 20])
  np.testing.assert_allclose(rates, expected, rtol=1e-6)


def test_step_schedule_after_a_warmup_drops_at_the_same_steps():
  rate = optimizers.make_schedule(
    "step",
    lr=2.0,
    num_steps=20,
    warmup_steps=4,
    milestones=(0.5,),
    milestone_factor=0.25,
  )
  rates = jax.vmap(rate)(jnp.arange(20))
  expected = [0.0, 0.5, 1.0, 1.5, *np.repeat([2.0, 0.5], [6, 10])]
  np.testing.assert_allclose(rates, expected, rtol=1e-6)


def test_milestones_that_share_a_step_all_count():
  rate = optimizers.make_schedule(
    "step", lr=1.0, num_steps=2, milestones=(0.4, 0.6)
  )
  np.testing.assert_allclose(rate(1), 0.01, rtol=1e-6)


@pytest.mark.parametrize(
  "options, sentence",
  [
    ({"name": "sdg"}, "optimizer.name.*Did you mean 'sgd'"),
    ({"schedule": "steps"}, "optimizer.schedule.*Did you mean 'step'"),
    ({"schedule": "step"}, "milestones must name at least one"),
    ({"milestones": (1.5,)}, r"milestones must be shares.*got 1.5"),
    ({"milestones": (5,)}, "milestones must be shares"),
    ({"milestones": (0.5, 0.5)}, "milestones must rise"),
    ({"milestones": (0.1,), "warmup_steps": 50}, "after optimizer.warmup"),
    ({"milestones": (0.5,), "milestone_factor": 0.0}, "milestone_factor"),
    ({"warmup_steps": 100}, "warmup_steps must be below"),
    ({"weight_decay": 0.1}, "weight_decay needs optimizer.name.*sgd.*'adam'"),
  ],
)
def test_mistake_is_one_sentence_naming_it(options, sentence):
  if "milestones" in options:
    options = {"schedule": "step", **options}
  with pytest.raises(ValueError, match=sentence):
    optimizers.make(num_steps=100, **options)
