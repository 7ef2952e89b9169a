"""What the checks of the gradients try: copies, noise, and who is left."""

import evaluation_models as toy
import jax
import numpy as np
import pytest

from robust_mm.evaluation import batches
from robust_mm.evaluation import forwards
from robust_mm.evaluation import probes


def test_copies_are_the_nearest_examples_of_another_label():
  model = toy.linear_model()
  params, state = model.init(jax.random.key(0))
  batch = toy.without(toy.make_batch(30), [])
  batch["present"]["left"][::4] = False
  data = batches.host_data(model, batch)
  device = batches.Device(params, state)
  units = {"left": 2.0, "right": 0.5}
  probe = probes.Probe(
    model,
    forwards.Forward(model, device, size=30),
    device,
    data,
    norm=2,
    units=units,
    valid_range=None,
    key=jax.random.key(0),
  )
  radius, left = probe.copied()
  label, present = batch["label"], batch["present"]
  reaches, robust = [], []
  for i in range(30):
    names = [m for m in toy.DIMS if present[m][i]]
    own = {m: x[i : i + 1] for m, x in batch["inputs"].items()}
    apart = {
      j: np.sqrt(
        sum(
          np.sum(((x[i] - x[j]) / units[m]) ** 2)
          for m, x in batch["inputs"].items()
          if m in names
        )
      )
      for j in range(30)
      if label[j] != label[i] and all(present[m][j] for m in names)
    }
    nearest = min(apart, key=apart.get)
    other = {m: x[nearest : nearest + 1] for m, x in batch["inputs"].items()}
    kept = [
      toy.logits(params, x, names).argmax() == label[i] for x in (own, other)
    ]
    robust.append(all(kept))
    if not all(kept):
      reaches.append(apart[nearest])
  assert left == pytest.approx(np.mean(robust))
  assert radius == pytest.approx(max(reaches), rel=1e-6)


def test_noise_has_its_size_and_keeps_the_range():
  seen = []
  model = toy.linear_model()
  params, state = model.init(jax.random.key(0))
  data = batches.host_data(model, toy.make_batch(20))
  device = batches.Device(params, state)

  class Watched(forwards.Forward):
    def __call__(self, data, rows, subset):
      seen.append(data.inputs)
      return super().__call__(data, rows, subset)

  for norm in (2, np.inf):
    probe = probes.Probe(
      model,
      Watched(model, device, size=20),
      device,
      data,
      norm=norm,
      units={"left": 2.0, "right": 0.5},
      valid_range={"right": (-0.2, 0.2)} if norm == 2 else None,
      key=jax.random.key(1),
    )
    seen.clear()
    probe.left_by_noise(0.7, num_draws=1)
    (moved,) = seen
    change = {m: moved[m] - data.inputs[m] for m in toy.DIMS}
    if norm == 2:
      grown = np.abs(moved["right"]) > np.maximum(
        0.2, np.abs(data.inputs["right"])
      )
      assert not grown.any()
      size = np.sqrt(
        np.sum((change["left"] / 2.0) ** 2, 1)
        + np.sum((change["right"] / 0.5) ** 2, 1)
      )
      assert np.all(size <= 0.7 * (1 + 1e-6))
      assert size.max() > 0.6
    else:
      np.testing.assert_allclose(np.abs(change["left"]), 1.4, rtol=1e-5)
      np.testing.assert_allclose(np.abs(change["right"]), 0.35, rtol=1e-5)


@pytest.mark.parametrize("norm", [2, np.inf])
def test_whom_noise_breaks_the_worst_case_leaves_out(norm):
  """Every draw is a feasible point, whatever the mean over draws is."""
  model = toy.linear_model()
  params, state = model.init(jax.random.key(0))
  data = batches.host_data(model, toy.make_batch(60))
  device = batches.Device(params, state)
  probe = probes.Probe(
    model,
    forwards.Forward(model, device, size=60),
    device,
    data,
    norm=norm,
    units=dict.fromkeys(toy.DIMS, 1.0),
    valid_range=None,
    key=jax.random.key(0),
  )
  clean = probe.worst(1.0)
  assert clean == pytest.approx(np.mean(probe.clean))
  kept = []
  real = probe.right
  probe.right = lambda moved: kept.append(real(moved)) or kept[-1]
  mean = probe.left_by_noise(1.0, num_draws=20)
  every = np.all(kept, axis=0) & probe.clean
  assert len(kept) == 20
  assert mean == pytest.approx(np.mean([probe.clean & k for k in kept]))
  assert probe.worst(1.0) == pytest.approx(np.mean(every))
  assert probe.worst(1.0) < mean < clean
  assert probe.worst(0.5) == pytest.approx(clean)
