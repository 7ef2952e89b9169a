"""Distillation across sets of modalities: closed forms, limits, optima."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from robust_mm import distillation
from robust_mm import modalities

NAMES = ("a", "b", "c")
B, K = 16, 5


def _normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), "float32")


def _softmax(x):
  return scipy.special.softmax(np.asarray(x, np.float64), axis=-1)


def _sigmoid(x):
  return scipy.special.expit(np.asarray(x, np.float64))


def _model(inputs):
  """Logits of a small network over what is present."""

  def logits_fn(params, present):
    kept = modalities.mask(inputs, present)
    hidden = sum(jnp.tanh(kept[m] @ params[m]) for m in NAMES)
    return hidden @ params["head"] + params["bias"][None]

  params = {m: _normal(i, 4, 8) for i, m in enumerate(NAMES)}
  return logits_fn, {**params, "head": _normal(8, 8, K), "bias": _normal(9, K)}


def _present(*patterns):
  rows = [[m in pattern for m in NAMES] for pattern in patterns]
  return {m: jnp.asarray(np.array(rows)[:, i]) for i, m in enumerate(NAMES)}


INPUTS = {m: _normal(20 + i, B, 4) for i, m in enumerate(NAMES)}
FULL = _present(*["abc"] * B)
TASKS = ("single_label", "multi_label", "regression")


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_value_is_the_entropy_of_scipy(temperature):
  g, f = 3 * _normal(0, B, K), 3 * _normal(1, B, K)
  found = distillation.divergence(g, f, temperature=temperature)
  p, q = _softmax(g / temperature), _softmax(f / temperature)
  expected = temperature**2 * scipy.stats.entropy(p, q, axis=-1)
  np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)
  found = distillation.divergence(
    g, f, task="multi_label", temperature=temperature
  )
  p, q = _sigmoid(g / temperature), _sigmoid(f / temperature)
  both = [np.stack([x, 1 - x]) for x in (p, q)]
  expected = scipy.stats.entropy(*both, axis=0).mean(axis=-1)
  np.testing.assert_allclose(found, temperature**2 * expected, rtol=2e-5)
  found = distillation.divergence(g, f, task="regression")
  expected = np.sum((np.asarray(g, float) - np.asarray(f, float)) ** 2, -1) / 2
  np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_gradients_are_the_closed_forms_and_none_reaches_the_teacher(
  temperature,
):
  g, f = 3 * _normal(0, B, K), 3 * _normal(1, B, K)
  expected = {
    "single_label": temperature
    * (_softmax(f / temperature) - _softmax(g / temperature)),
    "multi_label": temperature
    * (_sigmoid(f / temperature) - _sigmoid(g / temperature))
    / K,
    "regression": np.asarray(f - g, np.float64),
  }
  for task in TASKS:

    def total(teacher, student, task=task):
      return distillation.divergence(
        teacher, student, task=task, temperature=temperature
      ).sum()

    to_teacher, to_student = jax.grad(total, (0, 1))(g, f)
    np.testing.assert_allclose(to_student, expected[task], atol=1e-6)
    assert not np.any(to_teacher)


def test_bernoulli_gradients_at_extreme_logits_are_finite_and_right():
  pairs = [(a, b) for a in (-40.0, 0.0, 40.0) for b in (-40.0, 0.0, 40.0)]
  g, f = (jnp.array(column)[None] for column in zip(*pairs))

  def total(student):
    return distillation.divergence(g, student, task="multi_label").sum()

  found = jax.grad(total)(f)
  expected = (_sigmoid(f) - _sigmoid(g)) / len(pairs)
  np.testing.assert_allclose(found, expected, atol=1e-7)
  # The value at g = 40, f = -40 is 40 an entry: no 0 * inf, no log of 0.
  apart = distillation.divergence(
    jnp.array([40.0]), jnp.array([-40.0]), task="multi_label"
  )
  np.testing.assert_allclose(apart, 40.0, rtol=1e-6)


def test_impossible_classes_and_huge_logits_stay_finite():
  g = jnp.array([[0.0, -jnp.inf, 1.0], [1e4, -1e4, 0.0]])
  f = jnp.array([[0.5, -jnp.inf, 0.0], [-1e4, 1e4, 0.0]])

  def total(student):
    return distillation.divergence(g, student).sum()

  value, gradient = jax.value_and_grad(total)(f)
  p, q = _softmax([0.0, 1.0]), _softmax([0.5, 0.0])
  expected = scipy.stats.entropy(p, q) + 2e4
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  np.testing.assert_allclose(gradient, _softmax(f) - _softmax(g), atol=1e-6)


def test_the_limit_of_a_large_temperature_is_a_centred_square():
  with jax.enable_x64(True):
    rng = np.random.default_rng(3)
    g, f = rng.normal(size=(2, B, K))
    found = distillation.divergence(
      jnp.asarray(g), jnp.asarray(f), temperature=100.0
    )
    apart = f - g - (f - g).mean(axis=-1, keepdims=True)
    expected = np.sum(apart**2, axis=-1) / (2 * K)
    # The first correction is of the order of the logits over tau.
    np.testing.assert_allclose(found.mean(), expected.mean(), rtol=1e-2)
    closer = distillation.divergence(
      jnp.asarray(g), jnp.asarray(f), temperature=1000.0
    )
    np.testing.assert_allclose(closer.mean(), expected.mean(), rtol=1e-3)


def test_narrow_logits_are_compared_in_float32():
  g, f = 3 * _normal(0, B, K), 3 * _normal(1, B, K)
  narrow = [x.astype(jnp.bfloat16) for x in (g, f)]
  found = distillation.divergence(*narrow)
  assert found.dtype == jnp.float32
  wide = [x.astype(jnp.float32) for x in narrow]
  np.testing.assert_array_equal(found, distillation.divergence(*wide))


@pytest.mark.parametrize("task", TASKS)
def test_a_student_that_sees_what_its_teacher_sees_has_nothing_to_learn(task):
  logits_fn, params = _model(INPUTS)

  def loss_fn(params, subset):
    return distillation.masd(
      logits_fn,
      params,
      FULL,
      ("a",),
      subset=subset,
      task=task,
      temperature=2.0,
    ).loss

  run = jax.jit(jax.value_and_grad(loss_fn))
  loss, gradient = run(params, _present(*["a"] * B))
  assert abs(loss) < 1e-6
  assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient)) < 1e-6
  # It could have failed: another set has both.
  loss, gradient = run(params, _present(*["b"] * B))
  assert loss > 1e-2
  assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient)) > 1e-2


@pytest.mark.parametrize(
  "kind, subset", [("ema", "labelled"), ("frozen", "supersets")]
)
def test_no_gradient_reaches_another_teacher(kind, subset):
  logits_fn, params = _model(INPUTS)
  other = jax.tree.map(lambda x: x + 0.1, params)

  def loss_fn(params, other):
    teacher = distillation.choose_teacher(kind, params, **{kind: other})
    found = distillation.masd(
      logits_fn,
      params,
      FULL,
      ["a"],
      key=jax.random.key(0),
      teacher=teacher,
      teacher_subset=subset,
    )
    return found.loss

  own, others = jax.jit(jax.grad(loss_fn, (0, 1)))(params, other)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(others))
  assert all(np.any(leaf) for leaf in jax.tree.leaves(own))
  # The value does depend on the teacher.
  assert loss_fn(params, other) != loss_fn(params, params)


def test_the_gradient_of_a_self_teacher_is_that_of_a_constant_target():
  logits_fn, params = _model(INPUTS)
  target = logits_fn(params, _present(*["a"] * B))
  subset = _present(*["bc"] * B)

  def by_hand(params):
    found = distillation.divergence(target, logits_fn(params, subset))
    return found.mean()

  def loss_fn(params):
    return distillation.masd(logits_fn, params, FULL, ["a"], subset=subset).loss

  found, expected = jax.grad(loss_fn)(params), jax.grad(by_hand)(params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected
  )


def test_the_superset_teacher_is_the_mean_over_what_there_is():
  logits_fn, params = _model(INPUTS)
  patterns = ["abc", "ab", "a", "bc"] * (B // 4)
  present = _present(*patterns)
  found = distillation.teacher_logits(
    logits_fn, params, present, "a", subset="supersets"
  )
  sets = {
    "abc": ["a", "ab", "ac", "abc"],
    "ab": ["a", "ab"],
    "a": ["a"],
  }
  for row, pattern in enumerate(patterns):
    if pattern == "bc":  # a teacher without a: weight 0
      continue
    every = [
      np.asarray(logits_fn(params, _present(*[s] * B))[row], np.float64)
      for s in sets[pattern]
    ]
    np.testing.assert_allclose(found[row], np.mean(every, axis=0), atol=1e-5)
  plain = distillation.teacher_logits(logits_fn, params, present, "a")
  np.testing.assert_array_equal(plain[2], logits_fn(params, present)[2])
  weight = distillation.item_weights(present, "a", present)
  assert weight.tolist() == [1.0, 1.0, 1.0, 0.0] * (B // 4)


def test_a_part_of_the_labelled_set_stands_in_for_it():
  logits_fn, params = _model(INPUTS)
  present = _present(*["bc"] * B)
  found = distillation.teacher_logits(
    logits_fn, params, present, "a+b", subset="supersets"
  )
  every = [logits_fn(params, _present(*[s] * B)) for s in ("b", "bc")]
  np.testing.assert_allclose(found, (every[0] + every[1]) / 2, atol=1e-5)


@pytest.mark.parametrize("teacher_subset", distillation.TEACHER_SUBSETS)
def test_items_that_do_not_count_change_nothing(teacher_subset):
  """Taken out of the batch: the sum, the mean and the gradient stay."""
  patterns = ["abc", "a", "bc", "ab"] * (B // 4)
  counts = np.array([pattern in ("abc", "ab") for pattern in patterns])
  present = _present(*patterns)
  subset = modalities.sample_subsets(jax.random.key(3), present, ["a"])

  def run(rows):
    inputs = {m: x[rows] for m, x in INPUTS.items()}
    logits_fn, params = _model(inputs)
    part = {m: x[rows] for m, x in present.items()}
    chosen = {m: x[rows] for m, x in subset.items()}

    def loss_fn(params):
      found = distillation.masd(
        logits_fn,
        params,
        part,
        ["a"],
        subset=chosen,
        teacher_subset=teacher_subset,
      )
      return found.loss, found

    return jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)

  (loss, every), gradient = run(np.arange(B))
  (less, some), other = run(np.flatnonzero(counts))
  np.testing.assert_array_equal(every.weight, counts.astype(float))
  np.testing.assert_allclose(
    every.divergence.sum(), some.divergence.sum(), atol=1e-6
  )
  assert not np.any(np.asarray(every.divergence)[~counts])
  np.testing.assert_allclose(loss, less, atol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient, other
  )
  (none, _), gradient = run(np.flatnonzero(~counts))
  assert none == 0
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_nan_in_an_absent_modality_reaches_nothing():
  poisoned = {**INPUTS, "c": INPUTS["c"].at[:4].set(jnp.nan)}
  present = _present(*["ab"] * 4, *["abc"] * (B - 4))

  def run(inputs):
    logits_fn, params = _model(inputs)

    def loss_fn(params):
      return distillation.masd(
        logits_fn, params, present, ["a"], key=jax.random.key(0)
      ).loss

    return jax.jit(jax.value_and_grad(loss_fn))(params)

  jax.tree.map(np.testing.assert_array_equal, run(INPUTS), run(poisoned))


# A world of 4 x 3 cells, with whole numbers of items in each.
COUNTS = np.array([[5, 1, 2], [1, 4, 1], [2, 2, 6], [3, 1, 1]])


def test_the_optimum_on_a_disjoint_set_is_the_mean_of_the_teacher():
  """Tabular: the student's table of x_S ends at E[p_T | x_S]."""
  first, second = (
    np.repeat(index.ravel(), COUNTS.ravel()) for index in np.indices((4, 3))
  )
  teacher = 2 * _normal(5, 4, K)
  present = {m: jnp.ones(len(first), bool) for m in ("s", "t")}

  def logits_fn(params, present):
    rows = jnp.where(
      present["t"][:, None], params["t"][first], params["s"][second]
    )
    return rows

  def loss_fn(table):
    params = {"t": teacher, "s": table}
    # Of two modalities, all but one and not T: S is {s} for every item.
    return distillation.masd(
      logits_fn,
      params,
      present,
      ["t"],
      key=jax.random.key(0),
      distribution="leave_one_out",
    ).loss

  share = jnp.asarray(COUNTS.sum(axis=0) / COUNTS.sum(), jnp.float32)

  def step(table, _):
    return table - jax.grad(loss_fn)(table) / share[:, None], None

  table, _ = jax.lax.scan(step, jnp.zeros((3, K)), length=2000)
  conditional = COUNTS / COUNTS.sum(axis=0)
  expected = conditional.T @ _softmax(teacher)
  np.testing.assert_allclose(_softmax(table), expected, atol=1e-4)
  # It is none of the teacher's own rows.
  assert (
    np.abs(expected[:, None] - _softmax(teacher)[None]).max(-1).min() > 0.02
  )


def test_on_a_set_that_holds_the_labelled_one_the_optimum_is_the_teacher():
  """Joint student (t, s): its KL can reach 0, so nothing is gained."""
  first, second = (index.ravel() for index in np.indices((4, 3)))
  teacher = 2 * _normal(5, 4, K)

  def loss_fn(table):
    found = distillation.divergence(teacher[first], table[first, second])
    return found.sum()

  step = jax.jit(lambda table: table - jax.grad(loss_fn)(table))
  table = jnp.zeros((4, 3, K))
  for _ in range(1500):
    table = step(table)
  expected = np.repeat(_softmax(teacher)[:, None], 3, axis=1)
  np.testing.assert_allclose(_softmax(table), expected, atol=1e-4)


def test_the_ramp_is_linear_and_then_constant():
  steps = np.arange(0, 300)
  found = jax.vmap(lambda t: distillation.ramp(t, 300, weight=0.3))(steps)
  np.testing.assert_allclose(found, 0.3 * np.minimum(steps / 30, 1), atol=1e-6)
  flat = distillation.ramp(0, 300, weight=0.3, fraction=0)
  np.testing.assert_allclose(flat, 0.3, rtol=1e-6)


def test_the_examples_hold():
  assert doctest.testmod(distillation) == (0, 3)


def test_other_presence_is_no_other_program():
  logits_fn, params = _model(INPUTS)
  traced = []

  @jax.jit
  def run(key, present):
    traced.append(1)
    return distillation.masd(logits_fn, params, present, ["a"], key=key).loss

  for pattern in ("abc", "ab", "bc"):
    assert np.isfinite(run(jax.random.key(0), _present(*[pattern] * B)))
  assert len(traced) == 1


@pytest.mark.parametrize(
  "options, message",
  [
    ({"temperature": 0.0}, "temperature must be positive"),
    ({"temperature": -1.0}, "temperature must be positive"),
    ({"task": "multilabel"}, "task must be one of .*Did you mean"),
    ({"teacher_subset": "all"}, "subset must be one of"),
    ({"labelled": []}, "labelled must name at least one"),
    ({"labelled": ["a", "d"]}, "labelled names the unknown modality 'd'"),
    ({"labelled": ["a", "a"]}, "labelled has the modality 'a' twice"),
    ({"key": None}, "key is None"),
    ({"subset": {"a": jnp.ones(B, bool)}}, "subset must be of the modalities"),
    ({"distribution": "sizes"}, "distribution must be one of"),
  ],
)
def test_bad_arguments_are_refused_by_name(options, message):
  logits_fn, params = _model(INPUTS)
  options = {"labelled": ["a"], "key": jax.random.key(0), **options}
  with pytest.raises(ValueError, match=message):
    distillation.masd(logits_fn, params, FULL, **options)


def test_bad_teachers_and_ramps_are_refused_by_name():
  with pytest.raises(ValueError, match="kind must be one of"):
    distillation.choose_teacher("mean", {})
  with pytest.raises(ValueError, match="ema is None"):
    distillation.choose_teacher("ema", {})
  with pytest.raises(ValueError, match="teacher must have the shape"):
    distillation.divergence(jnp.zeros((2, 3)), jnp.zeros((2, 4)))
  with pytest.raises(ValueError, match="fraction must lie"):
    distillation.ramp(0, 10, fraction=1.5)
  with pytest.raises(ValueError, match="num_steps must be"):
    distillation.ramp(0, 0)
