"""evaluate with the ensemble: closed forms, and who broke what."""

import evaluation_models as toy
import jax
import numpy as np
import pytest

from robust_mm import attacks
from robust_mm import evaluation

RADII = (0.2, 0.6)
NAMES = [("left",), ("right",), ("left", "right")]


@pytest.fixture(scope="module")
def evaluated():
  model = toy.linear_model()
  params, state = model.init(jax.random.key(0))
  batch = toy.make_batch(60)
  protocol = evaluation.standard(
    radii=RADII,
    attack={"name": "auto"},
    tightness=(1.0, 1.1),
    masking_examples=0,
    batch_size=32,
  )
  report = evaluation.evaluate(
    model, params, batch, state=state, protocol=protocol
  )
  return report, params, batch


@pytest.mark.parametrize("names", NAMES, ids="+".join)
def test_attacked_accuracy_is_the_closed_form(evaluated, names):
  report, params, batch = evaluated
  right = toy.logits(params, batch["inputs"]).argmax(-1) == batch["label"]
  exact = toy.exact_radii(params, batch["inputs"], names=names)
  for row in report.results["attacked"]:
    if row["modalities"] == list(names):
      expected = np.mean(right & (exact > row["radius"]))
      assert row["accuracy"] == pytest.approx(expected)


def test_every_cell_says_which_member_broke_how_many(evaluated):
  report, _, _ = evaluated
  results = report.results
  members = list(attacks.auto(norm=2, budget=1.0).members)
  for names in NAMES:
    first, second = (
      row for row in results["attacked"] if row["modalities"] == list(names)
    )
    for row in (first, second):
      assert list(row["broken_by"]) == members
      assert row["broken_by"]["pgd"] > 0
    lost = 60 * (first["accuracy"] - second["accuracy"])
    # The joint ball starts from what one modality alone has left.
    if len(names) == 1:
      assert sum(second["broken_by"].values()) == round(lost)


def test_the_ensemble_is_held_against_the_certificate(evaluated):
  report, _, _ = evaluated
  assert all(check["passed"] for check in report.results["checks"])
  tightness = report.results["tightness"]
  assert tightness["attack"] == "auto"
  assert tightness["flipped"][0] == 0
  assert tightness["flipped"][1] > 0


def test_page_and_settings_name_the_members(evaluated, tmp_path):
  report, _, _ = evaluated
  settings = report.results["settings"]["attacks"]["auto"]
  assert settings["members"]["apgd_dlr"]["loss"] == "dlr"
  assert report.results["masking"] is None
  report.save(tmp_path)
  page = (tmp_path / "report.html").read_text()
  assert "Members of auto" in page
  assert "minimum_norm" in page
