"""Noise that an encoder hardly notices: nullspace.md 15, lines 6 to 10, 12."""

import math

import jax
import jax.numpy as jnp
import nullspace_linear
import numpy as np
import optax
import pytest
from nullspace_linear import linear

from robust_mm import nullspace
from robust_mm.models import vit
from robust_mm.nullspace import criteria
from robust_mm.nullspace import published
from robust_mm.nullspace import searching

EPS = 0.03


def mean(values):
  return float(jnp.mean(values))


# ---- a linear softmax model with a kernel: 4 tokens of 16, 3 classes


@pytest.fixture(scope="module")
def wide():
  return nullspace_linear.wide(1600)


@pytest.fixture(scope="module")
def in_kernel(wide):
  params, tokens = wide
  return nullspace.encoder_noise(
    linear, params, tokens, eps=EPS, num_steps=200, key=jax.random.key(2)
  )


def test_a_linear_model_with_a_kernel_reaches_the_largest_radius(
  wide, in_kernel
):
  params, tokens = wide
  assert in_kernel.status == "max_radius"
  assert not in_kernel.converged  # feasible, and not maximal
  assert in_kernel.approximate
  assert in_kernel.radius == pytest.approx(100)
  assert in_kernel.criterion <= EPS
  # What moves all logits alike changes no probability.
  params = params - jnp.mean(params, axis=1, keepdims=True)
  moved = linear(params, in_kernel.noise)
  residual = jnp.linalg.norm(moved) / (
    jnp.linalg.norm(in_kernel.noise) * jnp.linalg.norm(params, 2)
  )
  assert residual < 1e-4
  permuted = nullspace.permute(in_kernel.noise, jax.random.key(3))
  assert mean(nullspace.criterion(linear, params, tokens, permuted)) > 0.3


def test_noise_is_mean_free_and_every_token_has_its_radius(in_kernel):
  noise = in_kernel.noise[0]
  lengths = jnp.linalg.norm(noise, axis=-1)
  assert jnp.max(jnp.abs(jnp.mean(noise, axis=-1))) < 1e-4 * lengths[0]
  np.testing.assert_allclose(lengths, lengths[0], rtol=1e-5)
  assert in_kernel.norm == pytest.approx(float(2 * lengths[0]), rel=1e-5)


@pytest.mark.parametrize("eps", [1e-4, 1e-3])
def test_the_radius_of_a_linear_model_is_the_closed_one(eps):
  """crit(v) = v E[A J J A^T] v to second order; its smallest eigenvalue."""
  width = 6
  # On mean-free vectors the smallest singular value stands apart.
  free = np.linalg.svd(np.eye(width) - 1 / width)[0][:, : width - 1]
  rows = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 5)))[0].T
  params = free @ np.diag([3.0, 2.5, 2.0, 1.5, 0.5]) @ rows
  params = jnp.asarray(params, jnp.float32)
  tokens = jax.random.normal(jax.random.key(5), (6000, 1, width))
  result = nullspace.encoder_noise(
    linear,
    params,
    tokens,
    eps=eps,
    confidence=0.5,
    num_steps=300,
    start_radius=0.01,
    key=jax.random.key(6),
  )
  assert result.converged
  p = np.asarray(jax.nn.softmax(linear(params, tokens)), np.float64)
  jacobian = np.einsum("nk,kj->nkj", p, np.eye(8)) - np.einsum(
    "nk,nj->nkj", p, p
  )
  a = np.asarray(params, np.float64)
  moved = np.einsum("dk,nkj->ndj", a, jacobian)
  gram = np.einsum("ndj,nej->de", moved, moved) / len(p)
  values, vectors = np.linalg.eigh(free.T @ gram @ free)
  size = float(nullspace.scale(tokens))
  closed = math.sqrt(eps / values[0]) / size
  assert result.radius == pytest.approx(closed, rel=5e-2)
  w = np.asarray(result.noise[0, 0], np.float64)
  cosine = w @ (free @ vectors[:, 0]) / np.linalg.norm(w)
  assert abs(cosine) > 0.99
  low, high = result.bracket
  assert high / low <= 1.0071


# ---- a trained pre-LN transformer: 16 tokens of 32, real images


NET = vit.vision_transformer(
  width=32, depth=2, num_heads=2, mlp_dim=64, patch_size=7, num_classes=10,
  preprocess=(0.13, 0.31),
)  # fmt: skip
NUM_TRAIN = 10_000


def encode(params, tokens):
  return NET.encode(params, tokens)


@pytest.fixture(scope="module")
def toy(shared_path):
  """(params, tokens [n, 16, 32]): trained on the first 10,000."""
  held = dict(np.load(shared_path / "data" / "av_digits" / "mnist_images.npz"))
  images = np.concatenate(
    [held["train_images"][:NUM_TRAIN], held["test_images"][:1512]]
  )
  label = np.concatenate(
    [held["train_labels"][:NUM_TRAIN], held["test_labels"][:1512]]
  ).astype(np.int32)
  images, label = jnp.asarray(images[..., None] / 255.0, jnp.float32), label
  label = jnp.asarray(label)
  tx = optax.adam(optax.cosine_decay_schedule(4e-3, 1000))

  @jax.jit
  def fit(images, label):
    params = NET.init(jax.random.key(0), (28, 28, 1))

    def step(carry, number):
      params, opt_state = carry
      rows = jax.random.randint(
        jax.random.fold_in(jax.random.key(1), number), (64,), 0, NUM_TRAIN
      )

      def loss(params):
        logits = NET.apply(params, images[rows])
        return jnp.mean(
          optax.losses.softmax_cross_entropy_with_integer_labels(
            logits, label[rows]
          )
        )

      updates, opt_state = tx.update(jax.grad(loss)(params), opt_state)
      return (optax.apply_updates(params, updates), opt_state), None

    carry = (params, tx.init(params))
    (params, _), _ = jax.lax.scan(step, carry, jnp.arange(1000))
    said = jnp.argmax(NET.apply(params, images[NUM_TRAIN:]), axis=-1)
    return params, NET.embed(params, images), said

  params, tokens, said = fit(images, label)
  assert mean(said == label[NUM_TRAIN:]) > 0.85
  return params, tokens


def split(toy, seed):
  """Noise is found on training images, judged and reported on test images."""
  _, tokens = toy
  # The order of the test images is not random.
  order = jax.random.permutation(jax.random.key(seed), tokens[NUM_TRAIN:])
  return nullspace.Splits(
    optimise=tokens[:1000], holdout=order[:512], report=order[512:]
  )


@pytest.fixture(scope="module")
def splits(toy):
  return split(toy, 0)


SETTINGS = {
  "num_steps": 160,
  "batch_size": 64,
  "start_radius": 0.5,
  "num_bisections": 2,
  "eps": EPS,
}


@pytest.fixture(scope="module")
def found(toy):
  """Ten results, one a seed, each with images of its own to judge by."""
  params, _ = toy
  return [
    nullspace.encoder_noise(
      encode, params, split(toy, seed), key=jax.random.key(seed), **SETTINGS
    )
    for seed in range(10)
  ]


def test_noise_holds_on_data_that_nothing_was_decided_on(toy, found):
  params, _ = toy
  held = [result.criterion <= EPS for result in found]
  assert sum(held) >= 8
  others = []
  for seed, result in enumerate(found):
    assert result.converged
    assert result.agreement > 0.9
    report = split(toy, seed).report
    again = nullspace.criterion(encode, params, report, result.noise)
    assert result.criterion == pytest.approx(mean(again), rel=1e-4)
    permuted = nullspace.permute(result.noise, jax.random.key(seed))
    apart = mean(nullspace.criterion(encode, params, report, permuted))
    assert apart > 2 * EPS
    others.append(apart)
  # With as few steps as a test can have; many reach 5 eps in every seed.
  assert np.mean(others) > 5 * EPS


def test_the_set_is_not_symmetric(toy, splits, found, record_property):
  """Signs must not be flipped: -v is no nullspace noise."""
  params, _ = toy
  flipped = [
    mean(nullspace.criterion(encode, params, splits.report, -result.noise))
    for result in found
  ]
  record_property("criterion of -v", flipped)
  assert np.mean(flipped) > 5 * EPS


def test_smaller_noise_changes_less(toy, splits, found):
  params, _ = toy
  path = [
    mean(nullspace.criterion(encode, params, splits.report, t * found[0].noise))
    for t in (0.25, 0.5, 1.0, 1.5)
  ]
  assert path == sorted(path)


def test_converged_means_that_the_bound_holds_and_the_next_one_failed(found):
  for result in found:
    assert result.criterion_upper <= EPS
    low, high = result.bracket
    assert low == pytest.approx(result.radius)
    ratio = 1.25 ** (1 / 2 ** SETTINGS["num_bisections"])
    assert 1 < high / low <= ratio * 1.001
    radii = np.array(result.history["radius"])
    upper = np.array(result.history["upper"])
    assert np.all(upper[np.isclose(radii, high)] > EPS)
    assert upper[np.isclose(radii, low)].min() <= EPS


def test_one_step_still_gives_a_bracket(toy, splits):
  params, _ = toy
  settings = {**SETTINGS, "num_steps": 1}
  result = nullspace.encoder_noise(
    encode, params, splits, key=jax.random.key(0), **settings
  )
  assert result.converged
  assert result.criterion_upper <= EPS
  assert 0 < result.radius == result.bracket[0] < result.bracket[1]


def test_steps_reach_a_larger_radius_than_one(toy, splits, found):
  params, _ = toy
  few = nullspace.encoder_noise(
    encode,
    params,
    splits,
    key=jax.random.key(0),
    **{**SETTINGS, "num_steps": 1},
  )
  assert found[0].radius > 1.3 * few.radius


def test_what_is_not_feasible_is_called_so(toy, splits):
  params, _ = toy
  result = nullspace.encoder_noise(
    encode, params, splits, key=jax.random.key(0), **{**SETTINGS, "eps": 1e-12}
  )
  assert result.status == "infeasible"
  assert not result.approximate
  assert result.radius == 0
  assert not np.any(result.noise)
  assert len(result.history["radius"]) == 7  # six halvings


def test_a_stage_that_is_not_finite_counts_as_infeasible(splits):
  def broken(params, tokens):
    far = jnp.sum(jnp.abs(tokens - params)) < 0  # never: keeps the trace alive
    said = jnp.where(far, 0.0, jnp.nan) + jnp.sum(tokens, axis=1)
    return said

  result = nullspace.encoder_noise(
    broken, jnp.zeros(()), splits, key=jax.random.key(0), **SETTINGS
  )
  assert result.status == "infeasible"
  assert np.all(np.isnan(result.history["upper"]))


def test_the_global_profile_shares_what_there_is():
  w = nullspace.random_direction(jax.random.key(0), (16, 32), "global")
  assert jnp.sum(jnp.square(w)) == pytest.approx(16, rel=1e-4)
  peaked = (
    jnp.zeros((16, 32)).at[0].set(jax.random.normal(jax.random.key(1), 32))
  )
  from robust_mm.nullspace import tokens as tokens_lib

  shared = tokens_lib.normalize(peaked + 0.01 * w, "global")
  assert jnp.max(jnp.linalg.norm(shared, axis=-1)) <= 3 * (1 + 1e-5)
  assert jnp.sum(jnp.square(shared)) == pytest.approx(16, rel=1e-3)
  single = tokens_lib.normalize(peaked + 0.01 * w, "token")
  np.testing.assert_allclose(jnp.linalg.norm(single, axis=-1), 1, rtol=1e-5)


# ---- trivial directions and saturation


def test_what_is_constant_over_channels_is_free_with_a_layer_norm(toy):
  params, tokens = toy
  tokens = tokens[:64]
  noise = jnp.full((1, 16, 32), 10.0)
  clean = encode(params, tokens)
  assert jnp.max(jnp.abs(encode(params, tokens + noise) - clean)) < 1e-3

  def rms(params, tokens):
    """A layer that divides by the root mean square, and a mean over tokens."""
    size = jnp.sqrt(jnp.mean(jnp.square(tokens), axis=-1, keepdims=True) + 1e-6)
    return jnp.mean(tokens / size, axis=1) @ params["head"]["kernel"]

  moved = rms(params, tokens + noise) - rms(params, tokens)
  assert jnp.max(jnp.abs(moved)) > 1e-2


def test_noise_on_one_token_saturates(toy):
  params, tokens = toy
  w = nullspace.random_direction(jax.random.key(0), (16, 32))
  one = jnp.zeros_like(w).at[5].set(w[5])
  far, further = (
    mean(nullspace.criterion(encode, params, tokens[NUM_TRAIN:], t * one))
    for t in (1e3, 1e4)
  )
  assert further == pytest.approx(far, rel=0.02)
  near = mean(nullspace.criterion(encode, params, tokens[NUM_TRAIN:], one))
  assert near < 0.7 * far


# ---- the published procedure


def hand_rolled(grads_of, start, *, steps, lr, decay, length):
  """torch.optim.AdamW with CosineAnnealingLR, in float64."""
  v = np.asarray(start, np.float64)
  first, second = np.zeros_like(v), np.zeros_like(v)
  for t in range(1, steps + 1):
    rate = lr * (1 + math.cos(math.pi * (t - 1) / length)) / 2
    g = grads_of(v, t - 1)
    v = v * (1 - rate * decay)
    first = 0.9 * first + 0.1 * g
    second = 0.999 * second + 0.001 * g * g
    corrected = first / (1 - 0.9**t)
    v = v - rate * corrected / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
  return v


def test_published_noise_is_adamw_of_the_noise_itself():
  a = np.random.default_rng(0).normal(size=(8, 3))
  tokens = jnp.asarray(np.random.default_rng(1).normal(size=(400, 2, 4)))
  tokens = tokens.astype(jnp.float32)
  settings = published.Settings(
    eps=1e-9,
    limit=0.5,
    num_passes=1,
    batches=5,
    batch_size=16,
    schedule_steps=30,
    weight_decay=0.3,
    objective="logit_sq",
  )
  items = criteria.Items(tokens=tokens)
  weight = jnp.asarray(a, jnp.float32)
  found = published.descend(linear, weight, items, settings, jax.random.key(0))
  start = jax.random.uniform(
    jax.random.split(jax.random.key(0))[0], (2, 4), minval=-0.5, maxval=0.5
  )
  # |v A|^2 has the gradient 2 v A A^T, whatever the minibatch.
  by_hand = hand_rolled(
    lambda v, _: (2 * v.reshape(-1) @ a @ a.T).reshape(v.shape),
    start,
    steps=5,
    lr=0.1,
    decay=0.3,
    length=30,
  )
  np.testing.assert_allclose(found.noise, by_hand, rtol=1e-5, atol=1e-5)
  assert int(found.num_steps) == 5
  assert not found.reached
  without = hand_rolled(
    lambda v, _: (2 * v.reshape(-1) @ a @ a.T).reshape(v.shape),
    start,
    steps=5,
    lr=0.1,
    decay=0.0,
    length=30,
  )
  assert np.abs(found.noise - without).max() > 1e-2


def test_published_noise_stops_early_and_says_what_it_reached(toy, splits):
  params, _ = toy
  result = nullspace.published_noise(
    encode,
    params,
    splits.optimise,
    limit=0.3,
    share=1.0,
    batch_size=64,
    report=splits.report,
    key=jax.random.key(0),
  )
  assert result.status in ("early_stopped", "not_reached")
  assert not result.converged
  assert result.noise.shape == (1, 16, 32)
  seen = result.history["criterion"]
  if result.status == "early_stopped":
    assert seen[-1] < EPS <= min(seen[:-1], default=1)
    assert len(seen) <= 3 * 15
  else:
    assert len(seen) == 3 * 15
  unseen = mean(
    nullspace.criterion(encode, params, splits.report, result.noise)
  )
  assert result.criterion == pytest.approx(unseen, rel=1e-4)
  # Not mean-free: the published noise has what a LayerNorm throws away.
  assert jnp.max(jnp.abs(jnp.mean(result.noise, axis=-1))) > 1e-3
  never = nullspace.published_noise(
    encode, params, splits.optimise, limit=3.0, eps=1e-9, share=0.2,
    batch_size=64, report=splits.report, key=jax.random.key(0),
  )  # fmt: skip
  assert never.status == "not_reached"
  assert len(never.history["criterion"]) == 3 * 3


def test_random_noise_is_shrunk_to_the_criterion(toy, splits, found):
  params, _ = toy
  items = criteria.Items(tokens=splits.holdout)
  noise, reached = nullspace.random_at_criterion(
    encode, params, items, eps=EPS, key=jax.random.key(0)
  )
  assert reached <= EPS
  larger = nullspace.criterion(encode, params, splits.holdout, noise / 0.8)
  assert mean(larger) > EPS
  # Far smaller than nullspace noise of the same criterion.
  assert jnp.linalg.norm(noise) < 0.5 * found[0].norm


# ---- refusals

REFUSED = [
  ({"eps": 0.0}, "eps must be positive"),
  ({"profile": "tokens"}, "profile must be one of"),
  ({"objective": "l2"}, "objective must be one of"),
  ({"num_steps": 0}, "num_steps must be"),
  ({"growth": 1.0}, "growth must be above 1"),
  ({"confidence": 1.0}, "confidence must lie in"),
  ({"start_radius": 200.0}, "start_radius must not exceed"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_the_solver_refuses_by_name(wide, options, message):
  params, tokens = wide
  with pytest.raises(ValueError, match=message):
    nullspace.encoder_noise(
      linear, params, tokens, key=jax.random.key(0), **options
    )


def test_splits_must_be_disjoint_and_large_enough(wide):
  params, tokens = wide
  key = jax.random.key(0)

  def solve(*parts):
    return nullspace.encoder_noise(
      linear, params, nullspace.Splits(*parts), key=key
    )

  with pytest.raises(ValueError, match="optimise and report share 1 items"):
    solve(tokens[:100], tokens[100:200], tokens[99:300])
  with pytest.raises(ValueError, match="holdout must have at least 64"):
    solve(tokens[:100], tokens[100:163], tokens[163:300])
  with pytest.raises(ValueError, match="tokens must be"):
    nullspace.encoder_noise(linear, params, tokens[0], key=key)
  with pytest.raises(ValueError, match="tokens must have more than"):
    nullspace.encoder_noise(linear, params, tokens[:1512], key=key)
  with pytest.raises(ValueError, match="noise must be"):
    nullspace.criterion(linear, params, tokens, tokens[:2])
  with pytest.raises(ValueError, match="axis must be one of"):
    nullspace.permute(tokens[0], key, "rows")


def test_items_that_do_not_count_change_nothing(wide):
  params, tokens = wide
  settings = searching.Search(
    eps=1e-3, num_steps=5, batch_size=600, max_radius=2.0, num_bisections=1
  )
  poisoned = jnp.concatenate([tokens[:64], jnp.full((16, 4, 16), 1e6)])
  counted = jnp.arange(80) < 64
  found = [
    searching.search(
      linear,
      params,
      criteria.Items(tokens=tokens[100:700]),
      criteria.Items(tokens=rows, counted=flag),
      settings,
      jax.random.key(0),
    )
    for rows, flag in ((tokens[:64], None), (poisoned, counted))
  ]
  np.testing.assert_allclose(found[0].radius, found[1].radius)
  np.testing.assert_allclose(found[0].upper, found[1].upper, rtol=1e-5)
