"""Do hyper-gradients find meta-parameters that random search does not?

    python benchmarks/hypergradient_search.py [--seeds 5] [--trials 30]

Eight meta-parameters of a two-view network on ``digits`` (left and right half
of a scan): the log weight decay of six leaves (two layers of each view, head
kernel, head bias) and the log weights of two auxiliary losses, one a view. The
inner loss is the cross-entropy on 100 training images; the outer loss is that
of the joint head on 500 others.

Random search trains with 30 draws, uniform over a box in log-space. The
hyper-gradient starts in the middle of that box, stays in it, and has as many
gradient evaluations in all: training once, then a few inner steps and an outer
step in turns, and every 12 outer steps training anew with what was found (a
network keeps to the basin that it was trained in). Each Hessian product counts
as 2.1 gradients, evidence included.

Seeds 0 to 4 are not untouched: two earlier designs were judged on some of them
and lost. With another start for every random trial 0.420 to 0.385 (seeds 0, 1);
with cached bounds and no training anew 0.450 to 0.441 (seeds 0 to 2, two of
three won). The settings here were then chosen among eight on seeds 100 to 102;
a random search has none to choose but its box.

Either starts from the same parameters and is judged by the best validation loss
that it saw; the loss on 1,197 test images, which neither saw, is of that point.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from robust_mm import data
from robust_mm import hypergrad

VIEWS = ("left", "right")
HIDDEN, EMBEDDING = 32, 16
NUM_TRAIN, NUM_VALIDATION = 100, 500
TRAIN_STEPS, INNER_STEPS = 600, 10
LOW, HIGH = -9.0, 0.0
START = {"decay": jnp.full(6, -4.5), "auxiliary": jnp.full(2, -4.5)}
SOLVER = hypergrad.conjugate_gradient(10, max_steps=40)
REFRESH = 10
RESTART = 12
# A product with H, of a dense network: at most 2.1 (hypergradient_cost.py).
PRODUCT = 2.1


def load(seed):
  """Train, validation and test rows of the whole data set, split anew."""
  parts = [
    data.load("digits", split=s) for s in ("train", "validation", "test")
  ]
  label = np.concatenate([part["label"] for part in parts])
  views = {
    m: np.concatenate([part["inputs"][m] for part in parts]).reshape(
      len(label), -1
    )
    for m in parts[0]["inputs"]
  }
  order = np.random.default_rng(seed).permutation(len(label))
  edges = np.cumsum([NUM_TRAIN, NUM_VALIDATION])
  rows = np.split(order, edges)
  return [
    {
      "inputs": {m: jnp.asarray(x[r], jnp.float32) for m, x in views.items()},
      "label": jnp.asarray(label[r]),
    }
    for r in rows
  ]


def init(key, batch):
  """Parameters of two encoders, a joint head and two auxiliary heads."""
  params = {}
  for name, x in sorted(batch["inputs"].items()):
    key, *keys = jax.random.split(key, 4)
    shapes = ((x.shape[1], HIDDEN), (HIDDEN, EMBEDDING), (EMBEDDING, 10))
    params[name] = [
      jax.random.normal(k, s) / s[0] ** 0.5 for k, s in zip(keys, shapes)
    ]
  width = EMBEDDING * len(batch["inputs"])
  params["head"] = jax.random.normal(key, (width, 10)) / width**0.5
  params["bias"] = jnp.zeros(10)
  return params


def logits(params, inputs):
  embeddings = [
    jnp.tanh(jnp.tanh(x @ params[m][0]) @ params[m][1])
    for m, x in sorted(inputs.items())
  ]
  views = [
    e @ params[m][2] for e, m in zip(embeddings, sorted(inputs), strict=True)
  ]
  joint = jnp.concatenate(embeddings, -1) @ params["head"]
  return joint + params["bias"][None], views


def cross_entropy(scores, label):
  losses = optax.softmax_cross_entropy_with_integer_labels(scores, label)
  return jnp.mean(losses)


def inner(params, phi, batch):
  joint, views = logits(params, batch["inputs"])
  losses = jnp.stack([cross_entropy(s, batch["label"]) for s in views])
  names = sorted(batch["inputs"])
  leaves = [params[m][layer] for m in names for layer in (0, 1)]
  leaves += [params["head"], params["bias"]]
  squares = jnp.stack([jnp.sum(leaf**2) for leaf in leaves])
  # The auxiliary heads have a decay of their own, or nothing holds them.
  small = sum(jnp.sum(params[m][2] ** 2) for m in names)
  return (
    cross_entropy(joint, batch["label"])
    + jnp.exp(phi["auxiliary"]) @ losses
    + 0.5 * jnp.exp(phi["decay"]) @ squares
    + 0.5e-3 * small
  )


def outer(params, phi, batch):
  del phi
  return cross_entropy(logits(params, batch["inputs"])[0], batch["label"])


TX = optax.adam(0.01)


def descend(params, opt_state, phi, batch, num_steps):
  def step(carry, _):
    params, opt_state = carry
    gradient = jax.grad(inner)(params, phi, batch)
    updates, opt_state = TX.update(gradient, opt_state)
    return (optax.apply_updates(params, updates), opt_state), None

  carry, _ = jax.lax.scan(step, (params, opt_state), length=num_steps)
  return carry


@functools.partial(jax.jit, static_argnames="trials")
def random_search(key, train, validation, test, trials):
  """Validation and test losses of every trial."""

  def trial(draw):
    values = jax.random.uniform(draw, (8,), minval=LOW, maxval=HIGH)
    phi = {"decay": values[:6], "auxiliary": values[6:]}
    params = init(key, train)
    params, _ = descend(params, TX.init(params), phi, train, TRAIN_STEPS)
    return outer(params, phi, validation), outer(params, phi, test)

  return jax.lax.map(trial, jax.random.split(key, trials))


@functools.partial(jax.jit, static_argnames="budget")
def by_hypergradient(key, train, validation, test, budget):
  """The same of one run that adapts, within ``budget`` gradients."""
  gradient = hypergrad.hypergradient(inner, outer, solver=SOLVER)
  step = hypergrad.outer_step(
    gradient, optax.adam(0.2), step_clip=0.2, refresh_every=REFRESH
  )
  first = init(key, train)
  params, opt_state = descend(first, TX.init(first), START, train, TRAIN_STEPS)

  def losses(params):
    return jnp.stack([outer(params, START, b) for b in (validation, test)])

  def unfinished(carry):
    return carry[-2] < budget

  def go_on(carry):
    params, opt_state, state, best, spent, count = carry
    again = (count > 0) & (count % RESTART == 0)
    params, opt_state = jax.lax.cond(
      again,
      lambda: descend(first, TX.init(first), state.phi, train, TRAIN_STEPS),
      lambda: descend(params, opt_state, state.phi, train, INNER_STEPS),
    )
    now = losses(params)
    best = jnp.where(now[0] < best[0], now, best)
    state, info = step.update(
      state, params, train, validation, key=jax.random.fold_in(key, count)
    )
    phi = jax.tree.map(lambda leaf: jnp.clip(leaf, LOW, HIGH), state.phi)
    # Outer gradient, B^T x, linearisation, columns of B: .35 + .65 N.
    spent = spent + jnp.where(again, TRAIN_STEPS, INNER_STEPS)
    spent = spent + PRODUCT * info.num_matvecs + 3 + 6
    return params, opt_state, state._replace(phi=phi), best, spent, count + 1

  spent = jnp.float32(TRAIN_STEPS)
  begin = params, opt_state, step.init(START), losses(params), spent, 0
  _, _, state, best, _, _ = jax.lax.while_loop(unfinished, go_on, begin)
  return best, state


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--seeds", type=int, default=5)
  parser.add_argument("--trials", type=int, default=30)
  options = parser.parse_args()
  budget = options.trials * TRAIN_STEPS
  print(f"jax {jax.__version__}; {budget} gradients for either\n")
  print("seed  validation: start  random  hyper   test: random  hyper  steps")
  rows = []
  for seed in range(options.seeds):
    parts, key = load(seed), jax.random.key(seed)
    losses, tests = random_search(key, *parts, trials=options.trials)
    best = int(jnp.argmin(losses))
    at_start = by_hypergradient(key, *parts, budget=0)[0][0]
    found, state = by_hypergradient(key, *parts, budget=budget)
    row = at_start, losses[best], found[0], tests[best], found[1]
    rows.append([float(value) for value in row])
    print(
      "{:4d}            {:.4f}  {:.4f}  {:.4f}        {:.4f}  {:.4f}".format(
        seed, *rows[-1]
      )
      + f"  {state.num_accepted} taken, {state.num_rejected} refused"
    )
  table = np.array(rows)
  gap = table[:, 1] - table[:, 2]
  error = gap.std(ddof=1) / len(gap) ** 0.5 if len(gap) > 1 else np.nan
  print(
    "mean            {:.4f}  {:.4f}  {:.4f}        {:.4f}  {:.4f}".format(
      *table.mean(axis=0)
    )
  )
  print(
    f"\nrandom - hyper, validation: {gap.mean():+.4f} +- {1.96 * error:.4f}; "
    f"at least as low on {np.sum(gap >= 0)} of {len(gap)} seeds"
  )


if __name__ == "__main__":
  main()
