"""``robust-mm report``: several runs, one page, and where their files lie."""

import json

import evaluation_results as made
import pytest

from robust_mm import cli


@pytest.fixture
def folders(tmp_path):
  found = []
  for name, sound in (("joint", False), ("crmt-JT", True)):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "run.json").write_text('{"finished": {"joint": {}}}')
    result = made.make_result(name, sound=sound)
    (folder / "results.json").write_text(json.dumps(result))
    rows = made.make_history(certified=sound)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(lines)
    found.append(folder)
  return found


def report(folders, output):
  word = ",".join(map(str, folders))
  return cli.main(["report", f"--workdir={word}", f"--output={output}"])


def test_report_of_two_runs_is_one_page(folders, tmp_path, capsys):
  assert report(folders, tmp_path / "both") == 0
  out = capsys.readouterr()
  assert out.err == ""
  assert out.out.splitlines()[0].split() == ["accuracy", "joint", "crmt-JT"]
  assert out.out.splitlines()[-1].endswith("report.html")
  page = (tmp_path / "both" / "report.html").read_text()
  assert "joint: <code>../joint</code>" in page
  assert "crmt-JT: <code>../crmt-JT</code>" in page
  assert (tmp_path / "both" / "plots" / "training.png").is_file()
  assert {p.name for p in folders[0].iterdir()} == {
    "config.json",
    "run.json",
    "results.json",
    "metrics.jsonl",
  }


def test_report_into_one_file_names_that_file(folders, tmp_path, capsys):
  path = tmp_path / "one.html"
  assert report(folders, path) == 0
  assert capsys.readouterr().out.rstrip().endswith(f"report: {path}")
  assert path.is_file()


def test_an_empty_name_among_the_folders_is_refused(folders, tmp_path, capsys):
  assert report([folders[0], ""], tmp_path / "x") == 2
  assert "--workdir" in capsys.readouterr().err
  assert not (tmp_path / "x").exists()
