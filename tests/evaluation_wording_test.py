"""Words, tables and pages: what stands where, and what is never merged."""

import re

import evaluation_results as made
import pytest

from robust_mm import evaluation
from robust_mm.evaluation import details
from robust_mm.evaluation import texts
from robust_mm.evaluation import wording


def make_results():
  return [
    made.make_result("joint", sound=False, drop=0.8),
    made.make_result("crmt-JT"),
  ]


@pytest.fixture
def results():
  return make_results()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
  """The page of both runs, drawn once."""
  histories = [None, made.make_history()]
  folder = tmp_path_factory.mktemp("page")
  return page_of(make_results(), folder, histories=histories)


def spaces(text):
  return text.replace("\N{NO-BREAK SPACE}", " ")


def page_of(results, tmp_path, **arguments):
  path = tmp_path / "report.html"
  evaluation.render(results, path=path, **arguments)
  return spaces(path.read_text())


def without_pictures(page):
  page = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
  return re.sub(r'src="data:[^"]*"', "", page)


def test_made_results_are_whole(results):
  assert set(results[0]) == set(evaluation.SCHEMA)


def test_headlines_keep_attacked_certified_and_estimated_apart(results):
  found = wording.headlines(results)
  rows = [
    dict(zip(map(spaces, found["columns"]), map(spaces, row)))
    for row in found["rows"]
  ]
  assert rows == [
    {
      "clean": "90.0 %",
      "size of change": "l2 0.5",
      "attacked (at most)": "50.0 %",
      "certified (at least)": "-",
      "estimated (no guarantee)": "10.0 %",
      "one modality only, at worst": "60.0 % (left)",
    },
    {
      "clean": "90.0 %",
      "size of change": "l2 0.5",
      "attacked (at most)": "70.0 %",
      "certified (at least)": "50.0 %",
      "estimated (no guarantee)": "-",
      "one modality only, at worst": "60.0 % (left)",
    },
  ]
  alone = wording.headlines(results[1:])["columns"]
  assert not any("estimated" in column for column in alone)
  bare = wording.headlines([made.make_result(sound=None)])["columns"]
  assert not any(x in y for x in ("certified", "estimated") for y in bare)


def test_of_several_attacks_the_headline_is_the_strongest(results):
  result = results[1]
  weaker = [
    {**row, "attack": "fgm", **made.share(0.9)} for row in result["attacked"]
  ]
  result["attacked"] = [*result["attacked"], *weaker]
  result["settings"]["attacks"]["fgm"] = {"name": "fgm"}
  (row,) = wording.headlines([result])["rows"]
  assert "70.0 %" in map(spaces, row)
  (sentence,) = wording.summary([result])
  assert "pgd (50 steps, 5 restarts)" in sentence
  assert "70.0 %" in spaces(sentence)


def test_summary_says_radius_unit_attack_and_what_kind_of_bound(results):
  estimated, certified = map(spaces, wording.summary(results))
  for sentence in (estimated, certified):
    assert "0.5 (l2 norm of raw input values)" in sentence
    assert "pgd (50 steps, 5 restarts)" in sentence
  assert "it is proven that at least 50.0 %" in certified
  assert "estimate, which guarantees nothing, says 10.0 %" in estimated
  assert "proven" not in estimated
  assert "estimate" not in certified


def test_title_names_every_run_and_every_data_set(results):
  assert wording.title(results) == "Robustness of joint and crmt-JT on digits"
  results[1]["dataset"] = "mfeat"
  third = made.make_result("third")
  assert wording.title([*results, third]) == (
    "Robustness of joint, crmt-JT and third on digits and mfeat"
  )


def test_message_comes_before_tables_figures_and_settings(page):
  marks = [
    "<h1>",
    "<h2>In short",
    "“joint” is right on 90.0 %",
    "attacked (at most)",
    "<h2>What was tested",
    "<h2>The numbers",
    "<img",
    ">Every number with its settings",
    ">What the words mean",
    "<h2>Files",
  ]
  places = [page.index(mark) for mark in marks]
  assert places == sorted(places)


def test_page_needs_nothing_from_outside(page):
  for word in ("http", "//", "<script", "<link", "@import", "url("):
    assert word not in without_pictures(page), word
  targets = re.findall(r'href="#([^"]+)"', page)
  assert targets
  assert all(f'id="{target}"' in page for target in targets)


def test_page_fits_a_narrow_window(page):
  assert 'name="viewport"' in page
  assert "@media (max-width" in page
  tables = page.count("<table")
  assert tables == page.count('<div class="scroll"><table') > 0
  assert page.count("<img") == page.count('<div class="scroll"><img')


def test_numbers_of_a_page_have_few_digits(results, tmp_path):
  results[0]["units"] = {"left": 1.23456789, "right": 2.3456789}
  page = without_pictures(page_of(results, tmp_path))
  assert "1.2346" in page
  assert re.findall(r"\d\.\d{7,}|\d{7,}|\de[+]\d", page) == []


def test_every_figure_has_an_alternative_with_its_numbers(page):
  found = re.findall(r'<img alt="([^"]*)"', page)
  alternatives = dict(text.split(". ", 1) for text in found)
  assert len(alternatives) == 9
  for body in alternatives.values():
    assert "crmt-JT: " in body
  joint = alternatives[
    "Accuracy against the size of a change to all modalities"
  ]
  assert "attacked by pgd 80.0 % at 0.25, 70.0 % at 0.5" in joint
  assert "estimated 50.0 % at 0.25, 10.0 % at 0.5" in joint
  assert "left 60.0 %" in alternatives["Accuracy with missing modalities"]
  missing = alternatives["Accuracy against the missing rate"]
  assert "85.0 % at 0.10, 75.0 % at 0.30" in missing
  contributions = alternatives["What each modality contributes"]
  assert "left 0.300, right 0.500" in contributions
  region = alternatives["Two budgets at once"]
  assert "up to 0.49 of left alone or 0.49 of right alone" in region
  assert "certified accuracy 0.6" in alternatives["Training curves"]
  weak = alternatives["Which modality is the weak one"]
  assert "certified sensitivity left 0.30, right 0.70" in weak
  assert "accuracy lost left 0.40, right 0.40" in weak


def test_figures_say_with_what_their_numbers_were_made(page):
  common = (
    "200 test examples; sizes in l2 norm of raw input values; "
    "attack pgd (50 steps, 5 restarts)"
  )
  assert common in page
  assert "joint: estimated, source empirical, norm l2" in page
  assert "crmt-JT: certified, source global, norm l2" in page
  assert "a grid of 50 x 50 pairs of sizes" in page


def test_caption_explains_only_the_lines_that_are_drawn(results):
  solid = texts.caption("radius_joint", results[1:])
  assert "The dashed line is certified" in solid
  assert "dotted" not in solid
  dotted = texts.caption("radius_joint", results[:1])
  assert "The dotted line is only an estimate" in dotted
  assert "dashed" not in dotted


def test_table_of_many_runs_fits_its_width(results):
  runs = [made.make_result(f"run-{i}", sound=bool(i % 2)) for i in range(9)]
  wide, narrow = evaluation.table(runs), evaluation.table(runs, width=80)
  assert max(map(len, wide.splitlines())) > 80
  assert max(map(len, narrow.splitlines())) <= 80
  for run in runs:
    assert narrow.count(run["name"]) == 1
  assert narrow.count("accuracy") > 1
  numbers = re.compile(r"\d\.\d{4}")
  assert sorted(numbers.findall(wide)) == sorted(numbers.findall(narrow))
  kinds = ("attacked", "certified", "estimated")
  rows = [line for line in narrow.splitlines() if line.startswith(kinds)]
  assert all(numbers.search(row) for row in rows)
  tiny = evaluation.table(results, width=1)
  assert tiny.count("accuracy") == 2


def test_table_says_how_sizes_are_measured(results):
  text = evaluation.table(results)
  assert text.splitlines()[-1] == "sizes: l2 norm of raw input values"
  results[1]["units"] = {"left": 1.23456789, "right": 2.0}
  text = evaluation.table(results)
  assert "sizes: l2 norm in units of left 1.235, right 2" in text


def tables_of(result):
  return {t["title"]: t for t in details.details(result)["tables"]}


def test_details_hold_every_number_and_what_the_bound_rests_on(results):
  tables = tables_of(results[1])
  rows = tables["Attacked: pgd"]["rows"]
  assert rows[1] == ("all changed", "l2 0.5", "0.7000", "0.650 to 0.750", "200")
  assert len(rows) == len(results[1]["attacked"])
  assert "num_steps 50" in tables["Attacked: pgd"]["note"]
  assert "step 0.123457" in tables["Attacked: pgd"]["note"]
  assert len(tables["Certified"]["rows"]) == 9
  rests = dict(tables["What the bound rests on"]["rows"])
  assert rests["source"] == "global"
  assert rests["norm"] == "l2"
  assert rests["slack for rounding"] == "margin 64, sensitivity 1e-05"
  assert rests["time of certify / of a forward pass"] == "2.00"
  flips = tables["Attacked at multiples of the radius"]["rows"]
  assert flips == [
    ("1", "0.0000", "200"),
    ("1.2", "0.7500", "200"),
    ("2", "1.0000", "200"),
  ]
  timing = dict(tables["Time and memory"]["rows"])
  assert timing["everything"] == "1235 s"
  assert timing["forward pass, compiled, one batch"] == "0.816 ms"
  assert timing["peak memory"] == "584 MiB"
  assert "Certified" not in tables_of(results[0])
  assert "Estimated" in tables_of(results[0])


def test_details_give_raw_sizes_of_one_modality_where_units_differ(results):
  results[1]["units"] = {"left": 4.0, "right": 2.0}
  table = tables_of(results[1])["Attacked: pgd"]
  assert [heading for heading, _ in table["columns"]][2] == "raw size"
  raw = {(row[0], row[1]): row[2] for row in table["rows"]}
  assert raw["all changed", "l2 0.5"] == "-"
  assert raw["only left changed", "l2 0.5"] == "2"
  assert raw["only right changed", "l2 0.5"] == "1"


def test_page_says_where_the_files_of_each_run_lie(results, tmp_path):
  folders = [tmp_path / "runs" / "a", tmp_path / "both"]
  home = tmp_path / "both"
  evaluation.render(results, folders=folders, path=home)
  page = (home / "report.html").read_text()
  files = page[page.index("<h2>Files") :]
  assert "joint: <code>../runs/a</code>" in files
  assert "crmt-JT: <code>its own folder</code>" in files
  assert "results.json" in files
  assert "examples.csv" in files
  assert "plots/" in files
  assert str(tmp_path) not in page
  alone = page_of(results, tmp_path)
  assert "plots/" not in alone
  assert "saved into a folder" in alone
  with pytest.raises(ValueError, match="folders"):
    evaluation.render(results, folders=folders[:1], path=home)


def test_settings_are_written_as_a_reader_would():
  given = {"target": "", "lr": 0.1, "steps": None, "on": True}
  assert wording.settings_line(given) == "target none, lr 0.1, on yes"


def test_recipes_are_explained_where_they_are_known(results):
  assert "baseline" in dict(wording.run(results[0]))["training recipe"]
  assert "margin" in dict(wording.run(results[1]))["training recipe"]
  for name, word in (
    ("joint + topk_level", "baseline, and a penalty of the wrong logits"),
    ("nullspace-bank", "noise on tokens"),
    ("captioning + topk_level", "letter of a caption, and a penalty"),
  ):
    told = dict(wording.run(made.make_result(name)))["training recipe"]
    assert told.startswith(f"{name}: ")
    assert word in told
  other = made.make_result("jointly")
  assert dict(wording.run(other))["training recipe"] == "jointly"
