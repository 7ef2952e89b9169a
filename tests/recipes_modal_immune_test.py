"""ModalImmune: what is destroyed, what is not, and what it reduces to."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robust_mm import controllers
from robust_mm import hypergrad
from robust_mm import losses
from robust_mm import masking
from robust_mm import modalities
from robust_mm import models
from robust_mm import recipes
from robust_mm.models import encoders
from robust_mm.recipes import decoders
from robust_mm.recipes import destruction
from robust_mm.recipes import immune_jobs
from robust_mm.recipes import immunity
from robust_mm.recipes import probes
from robust_mm.training import state as state_lib
from robust_mm.training import steps

SHAPES = {"a": (6,), "b": (3, 2), "c": (5,)}
NAMES = tuple(SHAPES)
FEATURES = {
  name: (np.zeros(np.prod(s), np.float32), np.ones(np.prod(s), np.float32))
  for name, s in SHAPES.items()
}
DROPOUT = {
  "collapse_weight": 0.0,
  "controller": "uniform",
  "gate": "none",
  "clip": None,
  "guard_tolerance": None,
}


@pytest.fixture(scope="module")
def model():
  encoder = encoders.mlp(hidden_sizes=(6,), embedding_dim=4, activation="gelu")
  return models.masked_fusion(
    dict.fromkeys(SHAPES, encoder), 3, input_shapes=SHAPES, width=8
  )


def make_batch(seed=0, size=24, missing=0.3):
  rng = np.random.default_rng(seed)
  present = {n: jnp.asarray(rng.random(size) >= missing) for n in SHAPES}
  inputs = {
    name: jnp.asarray(rng.normal(size=(size, *shape)), jnp.float32)
    for name, shape in SHAPES.items()
  }
  return {
    "inputs": modalities.mask(inputs, present),
    "present": present,
    "label": jnp.asarray(rng.integers(0, 3, size)),
    "id": jnp.arange(size),
  }


def make(model, *, num_steps=50, tx=None, **options):
  recipe = recipes.modal_immune(
    model, num_steps=num_steps, tx=tx or optax.sgd(1.0), **options
  )
  return recipe.phases[0]


def begin(model, phase):
  return jax.jit(state_lib.initializer(model, phase))(jax.random.key(0))


def settings_of(monkeypatch, model, **options):
  """What the arguments have been made into."""
  found = []
  real = destruction.make_update

  def spy(settings, tx):
    found.append(settings)
    return real(settings, tx)

  monkeypatch.setattr(destruction, "make_update", spy)
  make(model, **options)
  return found[0]


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


def test_the_traced_removal_is_the_static_one():
  batch = make_batch()
  for arm, name in enumerate(NAMES):
    traced = jax.jit(modalities.removed)(batch["present"], arm)
    jax.tree.map(
      np.testing.assert_array_equal,
      traced,
      modalities.without(batch, name)["present"],
    )


def test_decoders_see_neither_the_removed_nor_the_absent():
  batch = make_batch()
  embeddings = {name: jnp.ones((24, 4)) for name in NAMES}
  made = decoders.init(jax.random.key(0), FEATURES, dict.fromkeys(SHAPES, 4))

  def loss(embeddings, inputs):
    return decoders.loss(
      made,
      FEATURES,
      embeddings,
      modalities.removed(batch["present"], 1),
      {**batch, "inputs": inputs},
    )

  spoiled = {
    n: jnp.where(
      jnp.reshape(batch["present"][n], (-1,) + (1,) * (x.ndim - 1)), x, np.nan
    )
    for n, x in batch["inputs"].items()
  }
  value, grads = jax.value_and_grad(loss)(embeddings, batch["inputs"])
  assert loss(embeddings, spoiled) == value
  alone = (
    batch["present"]["b"] & ~batch["present"]["a"] & ~(batch["present"]["c"])
  )
  assert np.all(np.asarray(grads["b"])[~np.asarray(alone)] == 0)
  assert np.any(grads["a"] != 0)


def test_a_feature_that_hardly_varies_does_not_own_the_reconstruction():
  """As the border of a picture once training moves it."""
  batch = make_batch(missing=0.0)
  embeddings = {name: jnp.ones((24, 4)) for name in NAMES}
  made = decoders.init(jax.random.key(0), FEATURES, dict.fromkeys(SHAPES, 4))
  made = jax.tree.map(jnp.zeros_like, made)  # says the mean of every feature

  def loss(deviation):
    scale = np.ones(6, np.float32)
    scale[0] = deviation
    features = {**FEATURES, "a": (FEATURES["a"][0], scale)}
    return decoders.loss(made, features, embeddings, batch["present"], batch)

  assert 0.8 < loss(1.0) < 1.2
  assert loss(1e-5) < loss(1.0) + decoders.LARGEST**2 / 6 / 3
  wanted = [
    np.mean(np.square(np.clip(batch["inputs"][name], -3, 3))) for name in NAMES
  ]
  np.testing.assert_allclose(loss(1.0), np.mean(wanted), rtol=1e-5)


def test_features_are_pooled_until_they_are_few():
  assert decoders.pooled(np.ones((2, 8, 4))).shape == (2, 32)
  assert decoders.pooled(np.ones((2, 40, 32))).shape == (2, 32)
  assert decoders.pooled(np.ones((2, 5, 40, 32))).shape == (2, 32)
  mean, deviation = recipes.feature_statistics(
    np.array([[1.0, 5.0], [3.0, 5.0], [99.0, 0.0]]),
    np.array([True, True, False]),
  )
  np.testing.assert_allclose(mean, [2, 5])
  np.testing.assert_allclose(deviation, [1, 1])


@pytest.mark.parametrize(
  "options, message",
  [
    ({"fidelity": "corrected"}, "fidelity"),
    ({"collapse_weight": -1.0}, "collapse_weight"),
    ({"gate": "newton"}, "gate must be one of"),
    ({"gate": "none", "gate_options": {"tau": 0.1}}, "gate_options must be"),
    ({"gate_options": {"taw": 0.1}}, "Did you mean 'tau'"),
    ({"gate_options": {"tau": -1.0}}, "tau"),
    (
      {"gate": "fisher", "gate_options": {"per_example_loss_fn": 0}},
      "not take",
    ),
    ({"controller": controllers.uniform(2)}, "controller must have 3 arms"),
    ({"removal": "all"}, "removal"),
    ({"damage_rate": 1.5}, "damage_rate"),
    ({"damage_rate": 0.5, "damage_kinds": ["swap"]}, "damage_kinds"),
    ({"damage_rate": 0.5, "damage_kinds": []}, "damage_kinds"),
    ({"damage_rate": 0.5, "damage_kinds": ["token_drop"]}, "damage_kinds"),
    ({"damage_rate": 0.5, "noise_scale": -1.0}, "noise_scale"),
    ({"damage_rate": 0.5, "noise_scale": {"a": 1.0}}, "noise_scale"),
    ({"temperature": 0.0}, "temperature"),
    ({"outer_solver": "newton"}, "outer_solver"),
    ({"outer_steps": 3}, "outer_steps goes with"),
    ({"outer_solver": "neumann", "outer_steps": 0}, "outer_steps"),
    ({"outer_solver": "identity", "outer_steps": 3}, "outer_steps"),
    ({"damping_ratio": 0.0}, "damping_ratio"),
    ({"consistency_weight": -1.0}, "consistency_weight"),
    ({"feedback_weight": -1.0}, "feedback_weight"),
    ({"collapse_weight": 0.0, "adapt": True}, "adapt must be False"),
    ({"reconstruction_weight": 0.1}, "reconstruction_weight must be 0"),
    ({"features": {"d": ()}}, "features"),
    ({"warmup_steps": 50}, "warmup_steps must be below"),
  ],
)
def test_bad_arguments_are_refused_by_name(model, options, message):
  with pytest.raises(ValueError, match=message):
    make(model, **options)


def test_models_without_encoders_of_their_own_are_refused():
  alone = models.masked_fusion(
    {"a": encoders.mlp()}, 3, input_shapes={"a": (3,)}
  )
  with pytest.raises(ValueError, match="at least two modalities"):
    make(alone)
  plain = models.from_function(
    lambda w, inputs: inputs["a"] @ w + inputs["b"] @ w,
    jnp.eye(3),
    num_classes=3,
    input_shapes={"a": (3,), "b": (3,)},
  )
  with pytest.raises(ValueError, match=r"params\['encoders'\]\['a'\]"):
    make(plain)


def _by_hand(model, params, batch):
  """(logits [7, 24, 3], counted [7, 24]) by seven whole passes."""
  logits, counted = [], []
  for subset in modalities.subsets(NAMES):
    kept = modalities.restrict(batch, subset)
    outputs, _ = model.apply(params, {}, kept["inputs"], kept["present"])
    logits.append(outputs.logits)
    counted.append(np.any([np.asarray(v) for v in kept["present"].values()], 0))
  return np.asarray(logits, np.float64), np.asarray(counted)


def test_every_set_and_their_consistency_by_hand(model):
  phase = make(
    model,
    removal="every",
    consistency_weight=0.7,
    temperature=3.0,
    attack_weight=1.5,
    warmup_steps=0,
    **DROPOUT,
  )
  state, batch = begin(model, phase), make_batch()
  logits, counted = _by_hand(model, state.params, batch)
  _, metrics = jax.jit(steps.make_train_step(phase))(
    state, batch, jax.random.key(1)
  )
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  label = np.asarray(batch["label"])
  each = -log_p[:, np.arange(24), label]
  over = [np.mean(e[c]) for e, c in zip(each, counted)]
  np.testing.assert_allclose(metrics["clean_loss"], over[-1], rtol=1e-5)
  np.testing.assert_allclose(metrics["attacked_loss"], np.mean(over), rtol=1e-5)
  soft = logits / 3
  soft = soft - np.log(np.exp(soft).sum(-1, keepdims=True))
  apart = np.sum(np.exp(soft[-1]) * (soft[-1] - soft), axis=-1)
  expected = 9 * np.mean([np.mean(a[c]) for a, c in zip(apart, counted)])
  np.testing.assert_allclose(metrics["disagreement"], expected, rtol=1e-4)
  total = over[-1] + 1.5 * np.mean(over) + 0.7 * expected
  np.testing.assert_allclose(metrics["loss"], total, rtol=1e-5)


def test_the_teacher_of_consistency_is_not_taught(model):
  params, _ = model.init(jax.random.key(0))
  batch = make_batch(missing=0.0)

  def apart(params, fixed):
    embeddings, _ = model.encode(
      params, {}, batch["inputs"], batch["present"], train=False
    )
    every = immunity.over_sets(model, params, embeddings, batch["present"])
    full = immunity.logits_of(model, fixed, embeddings, batch["present"])
    return immunity.disagreement(model, *every, full, 1.0)

  moving = jax.grad(lambda p: apart(p, p))(params)
  fixed = jax.grad(lambda p: apart(p, params))(params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), moving, fixed
  )
  assert optax.tree.norm(moving) > 1e-3


def test_feedback_climbs_the_loss_of_a_probe_up_to_chance():
  rng = np.random.default_rng(0)
  label = jnp.asarray(rng.integers(0, 3, 200))
  embeddings = {
    "a": jax.nn.one_hot(label, 3),
    "b": jnp.asarray(rng.normal(size=(200, 3)), jnp.float32),
  }
  present = {name: jnp.ones(200, bool) for name in embeddings}
  # Knows a by heart; of b it is worse than chance.
  known = {
    name: {"kernel": 4.0 * jnp.eye(3), "bias": jnp.zeros(3)} for name in "ab"
  }

  def pushed(arm):
    return jax.grad(lambda e: probes.feedback(known, e, present, label, arm))(
      embeddings
    )

  first = pushed(jnp.asarray(0))
  moved = {"a": embeddings["a"] - 1.0 * first["a"]}
  before, after = (
    probes.losses({"a": known["a"]}, e, {"a": present["a"]}, label)[0]
    for e in (embeddings, moved)
  )
  assert after > before
  assert not np.any(np.asarray(first["b"]))
  second = pushed(jnp.asarray(1))  # at chance already: nothing to climb
  assert not np.any(np.asarray(second["a"]))
  assert not np.any(np.asarray(second["b"]))
  for value in jax.tree.leaves(pushed(jnp.asarray(2))):
    assert not np.any(np.asarray(value))
  by_probe = jax.grad(
    lambda p: probes.feedback(p, embeddings, present, label, jnp.asarray(0))
  )(known)
  assert not np.any(jax.tree.leaves(jax.tree.map(jnp.any, by_probe)))


def test_feedback_reaches_the_encoder_of_the_arm_alone(model):
  off = {**DROPOUT, "clean_weight": 0.0, "attack_weight": 0.0}
  phase = make(model, feedback_weight=2.0, warmup_steps=0, **off)
  state, batch = begin(model, phase), make_batch(missing=0.0)
  step = jax.jit(steps.make_train_step(phase))
  embeddings, _ = model.encode(
    state.params, {}, batch["inputs"], batch["present"], train=False
  )
  answer = jax.nn.one_hot(batch["label"], 3) - 1 / 3
  fitted = {  # below chance, each of them
    name: {"kernel": 3 * jnp.linalg.pinv(z) @ answer, "bias": jnp.zeros(3)}
    for name, z in embeddings.items()
  }
  state = dataclasses.replace(state, extra={**state.extra, "probes": fitted})
  before, probed = state.params, state.extra["probes"]
  for _ in range(3):
    after, metrics = step(state, batch, jax.random.key(3))
    arm = NAMES[int(after.extra["arm"])]
    for name in NAMES:
      same = jax.tree.map(
        lambda a, b: bool(np.all(a == b)),
        state.params["encoders"][name],
        after.params["encoders"][name],
      )
      assert all(jax.tree.leaves(same)) == (name != arm), (name, arm)
    assert metrics["loss"] < 0
    state = after
  # Nothing else has moved, but the probes have learnt.
  jax.tree.map(
    np.testing.assert_array_equal, before["fusion"], state.params["fusion"]
  )
  assert not np.allclose(
    probed["a"]["kernel"], state.extra["probes"]["a"]["kernel"]
  )


def test_damage_is_of_the_arm_and_of_its_share(monkeypatch, model):
  settings = settings_of(
    monkeypatch, model, damage_rate=0.25, damage_kinds=("additive",)
  )
  batch = make_batch(size=2000)
  run = jax.jit(
    lambda key, arm: destruction.damaged(
      settings, key, batch["inputs"], batch["present"], arm
    )
  )
  for arm in range(4):
    found, intact = run(jax.random.key(arm), arm)
    for index, name in enumerate(NAMES):
      axes = tuple(range(1, found[name].ndim))
      changed = np.any(np.asarray(found[name] != batch["inputs"][name]), axes)
      there = np.asarray(batch["present"][name])
      np.testing.assert_array_equal(intact[name], there & ~changed)
      assert not np.any(changed & ~there)
      share = changed[there].mean()
      assert abs(share - (0.25 if index == arm else 0)) < 0.05


def test_without_a_rate_nothing_is_damaged(monkeypatch, model):
  assert settings_of(monkeypatch, model).damage is None


def test_who_is_damaged_says_nothing_about_how_much(monkeypatch, model):
  settings = settings_of(
    monkeypatch, model, damage_rate=0.25, damage_kinds=("frame_drop",)
  )
  inputs = {n: jnp.ones((8000, *s)) for n, s in SHAPES.items()}
  present = {n: jnp.ones(8000, bool) for n in SHAPES}
  found = jax.jit(
    lambda key: destruction.damaged(settings, key, inputs, present, 1)
  )(jax.random.key(0))[0]["b"]
  lost = np.all(np.asarray(found) == 0, axis=2)
  # A frame of a damaged example is lost with chance .1 to .9, .5 on average.
  assert abs(lost.mean() - 0.25 * 0.5) < 0.015


def _damaged_step(model, monkeypatch, **options):
  """(settings, params, batch, damaged inputs, intact, embeddings) of arm a."""
  settings = settings_of(
    monkeypatch,
    model,
    damage_rate=0.5,
    damage_kinds=("additive",),
    noise_scale=5.0,
    **{**DROPOUT, **options},
  )
  params, _ = model.init(jax.random.key(0))
  batch = make_batch(size=60)
  inputs, intact = destruction.damaged(
    settings, jax.random.key(1), batch["inputs"], batch["present"], 0
  )
  embeddings, _ = model.encode(params, {}, inputs, batch["present"])
  return settings, params, batch, intact, embeddings


def test_what_is_intact_teaches_and_counts_as_clean(model, monkeypatch):
  settings, params, batch, intact, embeddings = _damaged_step(
    model, monkeypatch, consistency_weight=1.0, removal="every"
  )
  hit = np.asarray(batch["present"]["a"] & ~intact["a"])
  assert 0 < hit.sum() < 60
  loss, parts = destruction.make_task(settings)(
    params, embeddings, {}, batch["present"], intact, batch
  )
  del loss
  outputs, _ = model.apply(params, {}, batch["inputs"], batch["present"])
  each = losses.cross_entropy(outputs.logits, batch["label"])
  counted = np.any([np.asarray(f) for f in batch["present"].values()], axis=0)
  np.testing.assert_allclose(
    parts["clean_loss"], np.mean(each[counted & ~hit]), rtol=1e-5
  )
  # The teacher has never seen the damage: it is the model on intact inputs.
  taught, _ = model.apply(params, {}, batch["inputs"], intact)
  every, left = immunity.over_sets(model, params, embeddings, batch["present"])
  some = np.any([np.asarray(f) for f in intact.values()], axis=0)
  assert np.any(counted & ~some)  # who had nothing but the arm is not taught
  left = {name: flag & some[None] for name, flag in left.items()}
  expected = immunity.disagreement(model, every, left, taught.logits, 2.0)
  np.testing.assert_allclose(parts["disagreement"], expected, rtol=1e-5)
  wrong = immunity.logits_of(model, params, embeddings, batch["present"])
  other = immunity.disagreement(model, every, left, wrong, 2.0)
  assert abs(other - expected) > 1e-3


def test_the_guard_does_not_see_damage(model, monkeypatch):
  settings, *_ = _damaged_step(model, monkeypatch)
  extra = {
    "count": jnp.asarray(50),
    "clean_loss": jnp.asarray(1.0),
    "best_clean_loss": jnp.asarray(1.0),
  }
  nothing = destruction.watch(settings, extra, 0.0, False, seen=False)
  assert nothing["clean_loss"] == 1
  assert nothing["best_clean_loss"] == 1
  some = destruction.watch(settings, extra, 0.0, False, seen=True)
  assert some["clean_loss"] < 1


def test_the_inner_loss_knows_of_feedback(model, monkeypatch):
  batch = make_batch()
  params, _ = model.init(jax.random.key(0))
  phi = {}
  rng = np.random.default_rng(0)
  made = {
    name: {
      "kernel": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32),
      "bias": jnp.zeros(3),
    }
    for name in NAMES
  }
  inner = {"batch": batch, "state": {}, "p": jnp.asarray([0.2, 0.3, 0.5])}
  inner.update(decoders={}, probes=made)
  found = {
    weight: immunity.expected_loss(
      settings_of(monkeypatch, model, feedback_weight=weight, **DROPOUT),
      params,
      phi,
      inner,
    )
    for weight in (0.0, 2.0)
  }
  embeddings, _ = model.encode(params, {}, batch["inputs"], batch["present"])
  bounded = probes.bounded(made, embeddings, batch["present"], batch["label"])
  expected = -2 * jnp.sum(inner["p"] * bounded)
  np.testing.assert_allclose(found[2.0] - found[0.0], expected, rtol=1e-4)
