"""The two runs of a quickstart, side by side."""

import pytest
from command_line import run

from robust_mm import commands
from robust_mm.training import runs


@pytest.fixture(autouse=True)
def smoke(monkeypatch):
  small = {name: f"{spec},smoke" for name, spec in commands.QUICKSTART.items()}
  monkeypatch.setattr(commands, "QUICKSTART", small)


@pytest.mark.parametrize(
  "taken, other", [("joint", "certified"), ("certified", "joint")]
)
def test_a_run_that_fails_stops_the_other_and_is_the_one_named(
  capsys, tmp_path, taken, other
):
  with runs.lock(tmp_path / taken):
    code, _, err = run(capsys, "quickstart", f"--workdir={tmp_path}")
  assert code == 2
  assert f"{tmp_path / taken} is in use" in err.splitlines()[-1]
  assert not (tmp_path / "report.html").exists()
  assert not (tmp_path / other / "results.json").exists()


def test_both_runs_and_the_report_of_both_are_written(capsys, tmp_path):
  code, out, err = run(capsys, "quickstart", f"--workdir={tmp_path}")
  assert code == 0, err
  for name in ("joint", "certified"):
    assert (tmp_path / name / "results.json").is_file()
    assert (tmp_path / name / "report.html").is_file()
  assert (tmp_path / "report.html").is_file()
  assert "joint" in out
