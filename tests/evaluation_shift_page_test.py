"""The page of a report of modality shift, and its text."""

import html
import re

import numpy as np
import pytest
from evaluation_shift_results import METHOD
from evaluation_shift_results import REFERENCE
from evaluation_shift_results import report_of
from evaluation_shift_results import right

from robust_mm.evaluation import shift_page
from robust_mm.evaluation import shift_texts


@pytest.mark.parametrize(
  "options", [{"fidelity": "published"}, {"reference": "own"}]
)
def test_a_report_of_own_references_is_written_and_shown(options):
  results = {"ft": right(REFERENCE), "masd": right(METHOD)}
  found = report_of(results, **options)
  assert (found.reference, found.baseline) == ("own", "ft")
  page = shift_page.render(found, title="t", drawn={})
  assert "times ft" in page
  assert "of each method itself trained and evaluated on E" in page
  assert "the method itself is within two" in page
  against = found.to_dict()["against_reference"]
  assert set(against) == {"masd"}
  form = "relative" if found.headline == "relative_raw" else "pooled"
  word = "raw" if found.headline == "relative_raw" else "corrected"
  stored = against["masd"]["shifted"]["improvement"][form][word]
  shown = found.improvement("masd", "ft")
  assert stored["value"] == shown.value
  assert f"{shown.value:.3f} [{shown.low:.3f}, {shown.high:.3f}]" in page
  assert found.estimate("masd").value == pytest.approx(
    found.estimate("masd", "shifted", found.headline).value
  )
  assert f"{found.estimate('masd').value:.3f} [" in page


def _rows(page, title):
  """``{method: cells}`` of the table with a title, and its head."""
  part = page[page.index(f"<h3>{title}") :]
  part = part[: part.index("</table>")]
  head = re.findall("<th scope=.col.>(.*?)</th>", part)
  rows = [re.findall("<td>(.*?)</td>", row) for row in part.split("<tr>")[2:]]
  return head, {row[0]: row[1:] for row in rows}


def test_the_page_shows_the_headline_drop_gain_strengths_and_seeds():
  stacked = [np.array(METHOD) + shift for shift in (-0.02, 0.0, 0.02)]
  results = {
    "ft": right(REFERENCE, num_seeds=3),
    "masd": np.concatenate([right(matrix) for matrix in stacked]),
  }
  found = report_of(results)
  page = html.unescape(shift_page.render(found, title="t", drawn={}))
  titles = re.findall("<h3>(.*?)</h3>", page)
  assert titles[:2] == ["relative robustness, pooled", "times ft (pooled)"]
  for title, estimate in (
    ("relative robustness", found.estimate("masd")),
    ("times ft", found.improvement("masd", "ft")),
  ):
    head, rows = _rows(page, title)
    assert head[:2] == ["method", "shifted"]
    seeds = f"({estimate.seed_low:.3f}..{estimate.seed_high:.3f})"
    assert estimate.seed_low < estimate.value < estimate.seed_high
    assert rows["masd"][0] == f"{shift_texts.with_interval(estimate)} {seeds}"
  head, rows = _rows(page, "drop and gain")
  assert head == ["method", "drop (missing)", "gain (added)"]
  assert [cell.split()[0] for cell in rows["masd"]] == ["0.180", "0.040"]
  head, rows = _rows(page, "one modality")
  assert head == ["method", "a", "b"]
  assert [cell.split()[0] for cell in rows["masd"]] == ["0.580", "0.660"]
  assert rows["masd"][0].endswith("(0.560..0.600)")
  assert "smallest and largest of single seeds" in page
  text = found.table()
  part = text[text.index("one modality, trained and evaluated on") :]
  for cell in (*rows["ft"], *rows["masd"]):
    assert cell in part
  many = report_of({"ft": right(REFERENCE, num_seeds=5)})
  page = shift_page.render(many, title="t", drawn={})
  assert ".." not in page[page.index("<h3>") :]
  assert "single seeds" not in page
