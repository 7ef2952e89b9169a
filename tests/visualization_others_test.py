"""Class visualisation with other modalities, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from visualization_models import KEY
from visualization_models import SHAPE
from visualization_models import WEIGHTS
from visualization_models import additive
from visualization_models import linear
from visualization_models import make

from robust_mm import visualization
from robust_mm.visualization import objectives
from robust_mm.visualization import transforms


@pytest.fixture(scope="module")
def late():
  return additive()


ITEMS = jax.random.normal(jax.random.key(6), (4, 3)) * 2


@pytest.mark.parametrize("objective", ["logit", "margin"])
def test_other_modalities_move_a_late_fusion_by_its_margin_alone(
  late, objective
):
  model, params = late
  found = [
    make(model, params, shape=None, others=others, objective=objective).inputs
    for others in ("absent", {"sound": ITEMS[0]}, {"sound": 3 * ITEMS[1]})
  ]
  for other in found[1:]:
    apart = np.abs(found[0] - other).max()
    assert apart <= 1e-6 if objective == "logit" else apart > 1e-4


def test_what_an_absent_modality_holds_reaches_nothing(late):
  model, params = late
  poisoned = {
    "inputs": {"sound": jnp.full((1, 3), jnp.nan)},
    "present": {"sound": np.array([False])},
  }
  clean = make(model, params, shape=None)
  other = make(model, params, shape=None, others=poisoned)
  np.testing.assert_array_equal(clean.inputs, other.inputs)
  np.testing.assert_array_equal(clean.objective, other.objective)
  heard = {**poisoned, "present": {"sound": np.array([True])}}
  third = make(model, params, shape=None, others=heard)
  assert np.all(third.first_bad_step == 0)


def test_a_batch_of_others_is_averaged_over(late):
  model, params = late
  both = make(
    model, params, shape=None, others={"sound": ITEMS[:2]}, num_steps=1
  )
  each = [
    make(model, params, shape=None, others={"sound": item}, num_steps=1)
    for item in ITEMS[:2]
  ]
  np.testing.assert_allclose(
    both.objective, np.mean([e.objective for e in each], 0), rtol=1e-5
  )


def test_joint_synthesis_makes_every_modality_and_says_whose_the_margin_is(
  late,
):
  model, params = late
  found = make(
    model,
    params,
    shape=None,
    others="joint",
    transforms={"image": transforms.image(), "sound": transforms.vector()},
    value_range={"image": (0.0, 1.0), "sound": (-2.0, 2.0)},
    num_steps=60,
  )
  assert found.inputs["image"].shape == (2, 2, *SHAPE)
  assert found.inputs["sound"].shape == (2, 2, 3)
  assert found.objective[..., -1].min() > found.objective[..., 0].max()
  for m, parts in found.margins.items():
    assert parts.shape == (2, 2), m
  scores = np.einsum("csd,kd->csk", found.inputs["sound"], params["sound"])
  rivals = np.where(np.eye(4, dtype=bool)[[0, 2]][:, None], -np.inf, scores)
  mine = np.stack([scores[0, :, 0], scores[1, :, 2]])
  np.testing.assert_allclose(
    found.margins["sound"], mine - rivals.max(-1), rtol=1e-4, atol=1e-5
  )


def test_automatic_scale_is_the_mean_margin_and_makes_weights_portable(late):
  model, params = late
  label = jnp.array([0, 1, 2, 3])
  items = {
    "inputs": {"image": 0.2 * WEIGHTS, "sound": ITEMS},
    "present": {"image": np.ones(4, bool), "sound": np.ones(4, bool)},
    "label": label,
  }
  options = {"shape": None, "objective_scale": "auto", "items": items}
  found = make(model, params, **options)
  logits = jnp.einsum("bhwc,khwc->bk", jnp.tanh(0.2 * WEIGHTS), WEIGHTS)
  margin = objectives.objective("margin", logits, label).mean()
  assert found.settings["objective_divisor"] == pytest.approx(
    float(margin), rel=1e-4
  )
  wrong = {**items, "label": jnp.roll(label, 1)}
  lost = make(model, params, **{**options, "items": wrong, "num_steps": 1})
  assert lost.settings["objective_divisor"] == 1
  with pytest.raises(ValueError, match="items"):
    make(model, params, shape=None, objective_scale="auto")
  # Logits twice as large: the logit objective divided by twice as much.
  logit = {**options, "objective": "logit"}
  large = make(model, jax.tree.map(lambda w: 50 * w, params), **logit)
  larger = make(model, jax.tree.map(lambda w: 100 * w, params), **logit)
  np.testing.assert_allclose(large.inputs, larger.inputs, atol=1e-4)


TOKENS = {"shape": {"image": SHAPE, "words": (4,)}}


@pytest.mark.parametrize(
  "options, sentence",
  [
    ({"classes": 4}, "classes"),
    ({"classes": -1}, "classes"),
    ({"classes": ()}, "classes"),
    ({"num_steps": 0}, "num_steps"),
    ({"num_transforms": 0}, "num_transforms"),
    ({"seeds": 0}, "seeds"),
    ({"tv_weight": -1.0}, "tv_weight"),
    ({"l2_weight": -1.0}, "l2_weight"),
    ({"learning_rate": 0.0}, "learning_rate"),
    ({"annealing": 2.0}, "annealing"),
    ({"mode": "inplace"}, "mode"),
    ({"objective": "logits"}, "objective"),
    ({"parameterization": "pixel"}, "parameterization"),
    ({"fidelity": "exact"}, "fidelity"),
    ({"others": "gone"}, "others"),
    ({"others": {"sound": ITEMS[0], "smell": ITEMS[0]}}, "others"),
    ({"others": {"sound": ITEMS[:, :2]}}, "others"),
    ({"transforms": transforms.vector()}, "transforms: vector"),
    ({"transforms": {"sound": transforms.vector()}}, "transforms"),
    ({"transforms": "image"}, "transforms"),
    ({"shape": (5, 6, 1)}, "shape"),
    ({"value_range": (1.0, 0.0)}, "value_range"),
    ({"value_range": (0.0, np.inf)}, "value_range"),
    ({"reference": np.zeros(7)}, "reference"),
    ({"objective_scale": 0.0}, "objective_scale"),
    ({"objective_scale": "automatic"}, "objective_scale"),
    ({"parameterization": "fourier", "mode": "in_place"}, "parameterization"),
    ({"parameterization": "fourier", "blur_every": 2}, "blur_every"),
  ],
)
def test_bad_input_is_refused_by_name(late, options, sentence):
  model, params = late
  with pytest.raises(ValueError, match=f"^{sentence}"):
    make(model, params, **{"shape": None, **options})


def test_modalities_that_cannot_be_are_refused_by_name(late):
  model, params = late

  def ask(model, name, **options):
    return visualization.class_visualization(
      model,
      params,
      name,
      0,
      key=KEY,
      transforms=transforms.identity(),
      **options,
    )

  with pytest.raises(ValueError, match="'imag'"):
    ask(model, "imag")
  with pytest.raises(ValueError, match="'sound' holds integer tokens"):
    ask(dataclasses.replace(model, tokens=("sound",)), "sound")
  shapes = {"shape": {"image": SHAPE, "sound": (3,)}}
  with pytest.raises(ValueError, match=r"others .* 'sound'"):
    ask(linear, "image", **shapes)
  with pytest.raises(ValueError, match="shape"):
    ask(linear, "image")
  with pytest.raises(ValueError, match="apply_fn"):
    ask("model", "image")
