"""Tables of the gradient checks: what was tried, and the number to quote."""

import evaluation_masked as masked
import evaluation_models as toy
import evaluation_results as made
import jax
import pytest

from robust_mm import evaluation
from robust_mm.evaluation import details
from robust_mm.evaluation import tables
from robust_mm.evaluation import wording


def spaces(text):
  return text.replace("\N{NO-BREAK SPACE}", " ")


@pytest.fixture(scope="module")
def found():
  """A thorough report with a surrogate, of a model without a slope."""
  return masked.report(
    masked.changed(inputs=masked.rounded),
    thorough=True,
    surrogate=masked.surrogate(),
  )


def rows(found):
  """``{title: {first cells: last cell}}``."""
  return {
    made["title"]: {row[:-1]: spaces(row[-1]) for row in made["rows"]}
    for made in tables.masking(found)
  }


def test_every_share_that_was_found_is_in_the_table(found):
  shown = rows(found)["Everything tried where gradients were checked"]
  shown = {name: value for (name,), value in shown.items()}
  said = lambda share: f"{100 * share:.1f} %"  # noqa: E731
  for name, share in found["objectives"].items():
    words = f"objective {name.replace('_', ' ')}"
    assert shown[words] == said(share)
  for steps, restarts, share in found["effort"]:
    plural = "" if restarts == 1 else "s"
    words = f"margin, {steps} steps, {restarts} restart{plural}"
    assert shown[words] == said(share)
  for loss, points in found["scales"].items():
    for divisor, share in points[1:]:
      words = f"{loss.replace('_', ' ')}, logits divided by {divisor}"
      assert shown[words] == said(share)
  assert shown["points made for another model"] == said(found["transfer"])
  assert shown["random search"] == said(found["accuracy"]["queries"])
  assert shown["noise"] == said(found["accuracy"]["noise"])
  assert shown["none"] == said(found["accuracy"]["clean"])
  assert said(found["worst_case"]) == next(
    value for name, value in shown.items() if name.startswith("worst case")
  )
  # Not one entry is a copy of another one by accident of a key.
  count = len(found["accuracy"]) + len(found["effort"]) + 1 + 1
  count += len(found["objectives"]) + len(found["curve"]) - 1
  count += sum(len(points) - 1 for points in found["scales"].values())
  assert len(shown) == count


def test_quantiles_of_both_models_are_in_the_table(found):
  shown = rows(found)["Margins, logits and gradients"]
  assert len(shown) == 6
  key = [cells for cells in shown if cells[:2] == ("the model", _GRADIENT)]
  assert key == [("the model", _GRADIENT, "0", "0", "0", "0")]
  (cells,) = [c for c in shown if c[0] != "the model" and c[1] == _GRADIENT]
  assert all(float(value) > 0 for value in cells[2:])


_GRADIENT = "l2 norm of the gradient of the margin"


def test_an_open_report_says_so_above_its_checks():
  found = masked.report(toy.linear_model(), size=10)
  note = tables.masking(found)[0]["note"]
  assert note.endswith("the checks could not have failed.")


def test_the_worst_case_stands_beside_the_headline(found):
  result = {**made.make_result(), "masking": found}
  headline = wording.headlines([result, made.make_result("other")])
  at = [column.startswith("worst case") for column in headline["columns"]]
  place = at.index(True)
  share = f"{100 * found['worst_case']:.1f} %"
  assert spaces(headline["rows"][0][place]) == f"{share} (of 60)"
  assert headline["rows"][1][place] == "-"
  assert place == 1 + [
    spaces(column).startswith("certified") for column in headline["columns"]
  ].index(True)
  (sentence,) = wording.summary([result])
  assert f"example by example, at most {share}." in spaces(sentence)


def test_results_of_earlier_versions_are_drawn_as_they_were(found):
  kept = ("num_examples", "norm", "radius", "loss", "checks", "accuracy")
  old = {name: found[name] for name in kept}
  result = {**made.make_result(), "masking": old}
  assert len(tables.masking(old)) == 1
  assert "worst" not in " ".join(wording.headlines([result])["columns"][:4])
  titles = [table["title"] for table in details.details(result)["tables"]]
  assert "Do gradients mislead the attacks?" in titles


def test_a_page_of_an_ordinary_evaluation_shows_them(tmp_path):
  model = toy.linear_model()
  params, state = model.init(jax.random.key(0))
  protocol = evaluation.standard(
    radii=(0.3,),
    modality_radii=(),
    attack={"name": "pgd", "num_steps": 5, "num_restarts": 1},
    tightness=(),
  )
  report = evaluation.evaluate(
    model, params, toy.make_batch(60), state=state, protocol=protocol
  )
  report.save(tmp_path)
  page = spaces((tmp_path / "report.html").read_text())
  worst = report.results["masking"]["worst_case"]
  assert f"{100 * worst:.1f} % (of 60)" in page
  for text in (
    "worst case of all checks",
    "everything at that size, example by example",
    "Margins, logits and gradients",
    "margin, logits divided by 1000",
  ):
    assert text in page, text


def test_captions_show_the_worst_case_and_what_is_doubtful():
  row = {
    "attack": "worst case",
    "modalities": "left+right",
    "radius": 0.1,
    "slots": {"left": 0.25, "right": 0.5},
    "exact_match": 0.125,
    "distinct_1": 0.5,
    "distinct_2": 0.25,
    "entropy": 1.5,
    "success": None,
  }
  found = {
    "num_examples": 8,
    "target": "one one",
    "target_clean": 0.375,
    "settings": {
      "num_steps": 2,
      "num_restarts": 1,
      "num_substitutions": 1,
      "mispair": True,
    },
    "rows": [row],
    "checks": [
      {"name": "a", "passed": True, "message": "Fine."},
      {"name": "b", "passed": False, "message": "Too few."},
    ],
  }
  made = tables.captions(found)
  assert list(map(spaces, made["rows"][0]))[3:6] == [
    "25.0 %",
    "50.0 %",
    "12.5 %",
  ]
  note = spaces(made["note"])
  assert "as it is of 37.5 %" in note
  assert note.endswith("The attacks may be misled: Too few.")
  assert "Fine." not in note
  for name in ("target_clean", "checks"):  # earlier versions have neither
    del found[name]
  assert "misled" not in tables.captions(found)["note"]
