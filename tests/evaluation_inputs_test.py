"""evaluate: what goes in: refused by name, thinned out, kept as it is."""

import dataclasses

import evaluation_models as toy
import jax
import numpy as np
import pytest

from robust_mm import evaluation

RADII = (0.2, 0.6)
ATTACK = {"name": "pgd", "loss": "margin", "num_steps": 20, "num_restarts": 2}
FGM = {"name": "fgm"}
QUIET = {"subsets": False, "attack": None}


def run(batch=None, **arguments):
  """The report of the linear model under a protocol of these arguments."""
  model = toy.linear_model()
  params, state = model.init(jax.random.key(0))
  protocol = evaluation.standard(**{"radii": RADII, "attack": FGM, **arguments})
  batch = toy.make_batch() if batch is None else batch
  return evaluation.evaluate(
    model, params, batch, state=state, protocol=protocol
  )


def test_max_examples_takes_evenly_spaced_rows():
  report = run(max_examples=7, **QUIET)
  ids = report.examples["id"]
  assert len(ids) == 7
  assert (ids[0], ids[-1]) == (1000, 1059)


def test_a_non_finite_output_is_a_wrong_prediction():
  batch = toy.make_batch()
  batch["inputs"]["left"][4] = np.inf
  report = run(batch=batch, **QUIET)
  assert report.examples["prediction"][4] == -1
  assert not report.examples["correct"][4]


@pytest.mark.parametrize(
  "change, word",
  [
    ({"label": np.full(60, 3)}, "label"),
    ({"label": np.zeros((60, 3), np.int32)}, "label"),
    ({"inputs": {"left": np.zeros((60, 5), np.float32)}}, "right"),
    ({"present": dict.fromkeys(toy.DIMS, np.zeros(60, bool))}, "present"),
  ],
)
def test_bad_data_is_refused_by_name(change, word):
  with pytest.raises(ValueError, match=word):
    run(batch={**toy.make_batch(), **change}, **QUIET)


@pytest.mark.parametrize(
  "arguments, word",
  [
    ({"attack": {"name": "pgdd"}}, "pgdd"),
    ({"attack": {"name": "fgm", "num_stepz": 3}}, "num_stepz"),
    ({"units": {"lef": 1.0}}, "lef"),
    ({"modality_radii": {"top": (0.1,)}}, "top"),
    ({"subsets": [("top",)]}, "top"),
  ],
)
def test_bad_protocol_is_refused_by_name(arguments, word):
  with pytest.raises(ValueError, match=word):
    run(**arguments)


def test_two_attacks_are_two_curves_and_keep_their_settings():
  other = {**FGM, "loss": "cross_entropy"}
  report = run(attack=[FGM, other], radii=(0.6,), certificate=None)
  settings = report.results["settings"]["attacks"]
  assert list(settings) == ["fgm", "fgm+"]
  assert [s["loss"] for s in settings.values()] == ["margin", "cross_entropy"]
  assert {row["attack"] for row in report.results["attacked"]} == set(settings)


def test_protocol_values_are_not_changed_by_a_run():
  protocol = evaluation.standard(radii=RADII, attack=ATTACK)
  model = toy.linear_model()
  params, _ = model.init(jax.random.key(0))
  protocol = dataclasses.replace(protocol, attacks=())
  before = protocol.settings
  evaluation.evaluate(model, params, toy.make_batch(), protocol=protocol)
  assert protocol.settings == before
  assert dataclasses.replace(protocol, radii=()).radii == ()
