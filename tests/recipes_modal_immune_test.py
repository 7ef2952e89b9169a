"""ModalImmune: what is destroyed, what is not, and what it reduces to."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from recipes_immune_models import DROPOUT
from recipes_immune_models import FEATURES
from recipes_immune_models import NAMES
from recipes_immune_models import begin
from recipes_immune_models import make
from recipes_immune_models import make_batch
from recipes_immune_models import settings_of
from recipes_immune_models import small

from robust_mm import controllers
from robust_mm import hypergrad
from robust_mm import losses
from robust_mm import masking
from robust_mm import modalities
from robust_mm import recipes
from robust_mm.recipes import destruction
from robust_mm.recipes import immune_jobs
from robust_mm.training import steps


@pytest.fixture(scope="module")
def model():
  return small()


def leave_one_out_loss(model, params, state, batch, arm):
  """Leave-one-out modality dropout, written down once more."""
  dropped = modalities.without(batch, NAMES[arm])
  outputs, _ = model.apply(
    params, state, dropped["inputs"], dropped["present"], train=True
  )
  each = losses.cross_entropy(outputs.logits, batch["label"])
  counted = jnp.any(modalities.stack(dropped["present"]), axis=0)
  return jnp.sum(jnp.where(counted, each, 0)) / jnp.sum(counted)


def test_without_collapse_it_is_leave_one_out_dropout(model):
  phase = make(model, clean_weight=0.0, warmup_steps=0, **DROPOUT)
  state, batch = begin(model, phase), make_batch()
  step = jax.jit(steps.make_train_step(phase))
  plain = jax.jit(
    jax.value_and_grad(
      lambda params, arm: jax.lax.switch(
        arm,
        [
          lambda p, i=i: leave_one_out_loss(model, p, {}, batch, i)
          for i in range(3)
        ],
        params,
      )
    )
  )
  arms = set()
  for _ in range(8):
    before = state.params
    state, metrics = step(state, batch, jax.random.key(1))
    arm = int(state.extra["arm"])
    arms.add(arm)
    loss, grads = plain(before, arm)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    moved = jax.tree.map(jnp.subtract, before, state.params)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), moved, grads
    )
  assert arms == {0, 1, 2}


def test_a_removed_modality_has_no_gradient_at_all(model):
  """Of every row that has another one, bit for bit; NaN goes nowhere."""
  phase = make(model, clean_weight=0.0, warmup_steps=0, **DROPOUT)
  state, batch = begin(model, phase), make_batch(missing=0.0)
  step = jax.jit(steps.make_train_step(phase))
  for _ in range(5):
    before = state.params
    state, _ = step(state, batch, jax.random.key(3))
    arm = NAMES[int(state.extra["arm"])]
    for name in NAMES:
      same = jax.tree.map(
        lambda a, b: bool(np.all(a == b)),
        before["encoders"][name],
        state.params["encoders"][name],
      )
      assert all(jax.tree.leaves(same)) == (name == arm), (name, arm)


@pytest.fixture(scope="module")
def whole(model):
  """(phase, step, number of traces) of all parts together."""
  phase = make(
    model,
    tx=optax.adamw(1e-2),
    features=FEATURES,
    gate_period=5,
    warmup_steps=3,
  )
  traces = []

  def counted(state, batch, key):
    traces.append(1)
    return phase.update(state, batch, key)

  counting = dataclasses.replace(phase, update=counted)
  return phase, jax.jit(steps.make_train_step(counting)), traces


def test_nan_of_a_missing_input_reaches_neither_loss_nor_parameters(
  model, whole
):
  phase, step, _ = whole
  batch = make_batch()
  poisoned = {
    name: jnp.where(
      jnp.reshape(batch["present"][name], (-1,) + (1,) * (x.ndim - 1)),
      x,
      jnp.nan,
    )
    for name, x in batch["inputs"].items()
  }
  clean = dirty = begin(model, phase)
  for _ in range(6):  # the collapse begins at the fourth
    clean, expected = step(clean, batch, jax.random.key(1))
    dirty, found = step(dirty, {**batch, "inputs": poisoned}, jax.random.key(1))
    assert expected == found
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(dirty.params))
  jax.tree.map(np.testing.assert_array_equal, clean.params, dirty.params)


def flip_gates(state):
  def flip(node):
    if not isinstance(node, masking.CurvatureMaskState):
      return node
    return node._replace(gates={n: ~gate for n, gate in node.gates.items()})

  is_mask = lambda n: isinstance(n, masking.CurvatureMaskState)  # noqa: E731
  opt_state = jax.tree.map(flip, state.opt_state, is_leaf=is_mask)
  return dataclasses.replace(state, opt_state=opt_state)


def test_one_trace_for_all_arms_and_gates(model, whole):
  phase, step, traces = whole
  state, arms = begin(model, phase), set()
  for index in range(50):
    state, metrics = step(state, make_batch(index), jax.random.key(0))
    arms.add(int(state.extra["arm"]))
    if index % 7 == 0:
      state = flip_gates(state)
    assert np.isfinite(metrics["loss"])
  assert {0, 1, 2} <= arms
  assert len(traces) == 1
  report = masking.gate_report(state.opt_state)
  assert any(0 < line["rate"] < 1 for line in report.values())


@pytest.mark.parametrize(
  "gate, options",
  [
    ("fisher", {"quantile": 0.5}),
    ("random", {"rate": 0.5}),
    ("directional", {"tau": 0.1}),
  ],
)
def test_every_gate_can_be_chosen_by_name(model, gate, options):
  phase = make(
    model, gate=gate, gate_options=options, gate_period=1, warmup_steps=0
  )
  state, closed = begin(model, phase), set()
  step = jax.jit(steps.make_train_step(phase))
  for index in range(6):
    state, _ = step(state, make_batch(index), jax.random.key(0))
    report = masking.gate_report(state.opt_state)
    closed |= {(name, bool(line["gate"])) for name, line in report.items()}
    if gate == "fisher":
      for line in report.values():
        # Half of every encoder is let through, and ties.
        assert 0.3 < line["rate"] <= 0.5
  if gate == "random":
    assert closed == {(name, gate) for name in NAMES for gate in (True, False)}


def test_a_fisher_mask_destroys_only_where_the_task_is_insensitive(model):
  phase = make(
    model,
    gate="fisher",
    gate_options={"quantile": 0.5},
    warmup_steps=0,
    attack_weight=0.0,
    clean_weight=0.0,
    guard_tolerance=None,
  )
  state, batch = begin(model, phase), make_batch(missing=0.0)
  before = state.params
  state, _ = jax.jit(steps.make_train_step(phase))(
    state, batch, jax.random.key(2)
  )
  arm = NAMES[int(state.extra["arm"])]

  def loss(params, index):
    row = jax.tree.map(lambda x: x[index][None], batch)
    logits = model.apply(params, {}, row["inputs"], row["present"])[0].logits
    return losses.cross_entropy(logits, row["label"])[0]

  grads = [jax.grad(loss)(before, i)["encoders"][arm] for i in range(24)]
  fisher = np.concatenate(
    [
      np.mean(np.square(leaves), axis=0).ravel()
      for leaves in zip(*(jax.tree.leaves(g) for g in grads))
    ]
  )
  moved = np.concatenate(
    [
      np.ravel(a != b)
      for a, b in zip(
        jax.tree.leaves(before["encoders"][arm]),
        jax.tree.leaves(state.params["encoders"][arm]),
      )
    ]
  )
  assert moved.any()
  median = np.sort(fisher)[int(np.ceil(0.5 * fisher.size)) - 1]
  assert fisher[moved].max() <= median * (1 + 1e-4)


def test_collapse_waits_for_the_warm_up(model, whole):
  phase, step, _ = whole
  state, batch = begin(model, phase), make_batch()
  weights = []
  for _ in range(5):
    state, metrics = step(state, batch, jax.random.key(0))
    weights.append(round(float(metrics["collapse_weight"]), 5))
  assert weights == [0, 0, 0, 0.1, 0.1]
  assert phase.jobs[0].start > 3


@pytest.mark.parametrize("spectral_weight", [0.0, 0.1])
def test_destruction_touches_the_attacked_encoder_alone(model, spectral_weight):
  phase = make(
    model,
    attack_weight=0.0,
    clean_weight=0.0,
    warmup_steps=0,
    guard_tolerance=None,
    gate="none",
    spectral_weight=spectral_weight,
  )
  state, batch = begin(model, phase), make_batch()
  step = jax.jit(steps.make_train_step(phase))
  size = lambda params, name: np.linalg.norm(  # noqa: E731
    model.encode(params, {}, batch["inputs"], batch["present"])[0][name]
  )
  for _ in range(4):
    before = state.params
    state, _ = step(state, batch, jax.random.key(2))
    arm = NAMES[int(state.extra["arm"])]
    moved = {
      jax.tree_util.keystr(path, simple=True, separator="/")
      for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(before),
        jax.tree.leaves(state.params),
      )
      if np.any(a != b)
    }
    assert moved
    assert all(name.startswith(f"encoders/{arm}/") for name in moved), moved
    if not spectral_weight:
      assert size(state.params, arm) < size(before, arm)


@pytest.fixture(scope="module")
def outer(model):
  phase = make(model, features=FEATURES, gate="none")
  job = next(job for job in phase.jobs if job.name == "outer")
  return phase, jax.jit(job.run)


def test_meta_parameters_move_only_where_the_step_is_accepted(model, outer):
  phase, adapt = outer
  state = begin(model, phase)
  fresh, used = make_batch(1), make_batch(2)
  after, metrics = adapt(state, (fresh, used), jax.random.key(0))
  moved = jax.tree.map(
    lambda a, b: float(abs(a - b)),
    after.extra["outer"].phi,
    state.extra["outer"].phi,
  )
  assert metrics["accepted"] == 1
  assert all(0 < value <= 0.1 for value in jax.tree.leaves(moved))
  spoiled = {
    **fresh["inputs"],
    "a": jnp.full_like(fresh["inputs"]["a"], np.nan),
  }
  same, metrics = adapt(
    after, ({**fresh, "inputs": spoiled}, used), jax.random.key(0)
  )
  assert metrics["accepted"] == 0
  assert metrics["acceptance_rate"] == 0.5
  assert same.extra["outer"].phi == after.extra["outer"].phi
  jax.tree.map(np.testing.assert_array_equal, same.params, state.params)


def test_published_fidelity_differs_where_it_is_said_to(monkeypatch, model):
  ours = settings_of(monkeypatch, model)
  monkeypatch.undo()
  theirs = settings_of(monkeypatch, model, fidelity="published")
  assert (ours.gain, theirs.gain) == ("hinge", "squared")
  assert (ours.gaussian_target, theirs.gaussian_target) == (
    "expected",
    "sampled",
  )
  assert (ours.clean_weight, theirs.clean_weight) == (1.0, 0.0)
  assert (ours.controller.kind, theirs.controller.kind) == ("hedge", "exp3")
  assert ours.controller.share > 0
  assert (ours.gates, theirs.gates) == (True, False)

  def operator(settings):
    return immune_jobs.outer_step(settings).update.args[0].operator

  assert isinstance(operator(ours), hypergrad.Damped)
  assert isinstance(operator(theirs), hypergrad.Published)
  again = recipes.modal_immune(
    model, num_steps=9, tx=optax.sgd(1.0), fidelity="published", gain="hinge"
  )
  assert again.name == "modal_immune-published"


def test_solver_and_damping_of_the_outer_step_can_be_chosen(monkeypatch, model):
  def chosen(**options):
    with monkeypatch.context() as patch:
      settings = settings_of(patch, model, **options)
    return immune_jobs.outer_step(settings).update.args[0]

  plain = chosen()
  assert plain.solver == hypergrad.conjugate_gradient(10)
  assert plain.operator == hypergrad.damped()
  found = chosen(outer_solver="neumann", outer_steps=20, damping_ratio=0.2)
  assert found.solver == hypergrad.neumann(20)
  assert found.operator == hypergrad.damped(ratio=0.2)
  assert chosen(outer_solver="identity").solver == hypergrad.identity()


def test_published_form_takes_steps(model):
  phase = make(model, fidelity="published", warmup_steps=0, tx=optax.adam(1e-2))
  state, batch = begin(model, phase), make_batch()
  step = jax.jit(steps.make_train_step(phase))
  seen = set()
  for _ in range(4):
    state, metrics = step(state, batch, jax.random.key(0))
    expected = (
      metrics["attacked_loss"]
      + metrics["collapse_weight"] * (metrics["collapse_loss"])
    )
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    seen.add(float(metrics["collapse_loss"]))
  assert len(seen) == 4  # fresh noise
  assert not masking.gate_report(state.opt_state)["a"]["rate"]


def test_a_probe_is_one_round_of_the_controller(model):
  phase = make(model, gate="none", adapt=False)
  state, batch = begin(model, phase), make_batch(missing=0.0)
  (probe,) = phase.jobs
  after, metrics = jax.jit(probe.run)(state, batch, jax.random.key(0))
  gains = np.array([metrics[f"gain_{name}"] for name in NAMES])
  assert np.all(gains >= 0)
  assert int(after.extra["controller"].rounds) == 1
  expected = controllers.scale_gains(
    controllers.initial_scale(), jnp.asarray(gains)
  )
  np.testing.assert_allclose(after.extra["gain_scale"], expected.scale)
  order = np.argsort(after.extra["controller"].log_weights)
  if gains.max() > 1e-6:
    assert order[-1] == gains.argmax()
  assert all(metrics[f"rank_{name}"] > 0 for name in NAMES)


def test_verdicts_and_what_was_not_finite_are_logged(model, whole):
  phase, _, _ = whole
  state = begin(model, phase)

  def marked(node):
    if not isinstance(node, masking.CurvatureMaskState):
      return node
    return node._replace(
      nonfinite_count={**node.nonfinite_count, "b": jnp.asarray(3, jnp.int32)},
      verdicts={**node.verdicts, "c": jnp.asarray(masking.UNDECIDED, jnp.int8)},
    )

  is_mask = lambda n: isinstance(n, masking.CurvatureMaskState)  # noqa: E731
  opt_state = jax.tree.map(marked, state.opt_state, is_leaf=is_mask)
  state = dataclasses.replace(state, opt_state=opt_state)
  batch = make_batch(missing=0.0)
  probe = next(job for job in phase.jobs if job.name == "probe")
  _, found = jax.jit(probe.run)(state, batch, jax.random.key(0))
  assert [found[f"nonfinite_{name}"] for name in NAMES] == [0, 3, 0]
  verdicts = [found[f"verdict_{name}"] for name in NAMES]
  assert verdicts == [masking.OPEN, masking.OPEN, masking.UNDECIDED]


def test_nothing_is_attacked_while_the_clean_loss_is_worse_than_it_was(
  monkeypatch, model
):
  settings = settings_of(monkeypatch, model, guard_tolerance=0.05)
  extra = {
    "controller": settings.controller.init(),
    "clean_loss": jnp.asarray(1.06),
    "best_clean_loss": jnp.asarray(1.0),
  }
  key, cold = jax.random.key(0), jnp.asarray(False)
  assert destruction.draw(settings, key, extra, cold) == 3
  assert destruction.draw(settings, key, extra, ~cold) < 3
  fine = {**extra, "clean_loss": jnp.asarray(1.04)}
  assert destruction.draw(settings, key, fine, cold) < 3
  present = make_batch()["present"]
  left = modalities.removed(present, 3)
  jax.tree.map(np.testing.assert_array_equal, left, present)
