"""Metrics on disk: whole rows, once each, and curves without their holes."""

import json
import logging
import math

from robust_mm.training import writers


def test_rows_after_the_restored_step_are_written_once(tmp_path):
  first = writers.Writer(tmp_path, step=0)
  for step in (1, 2, 3):
    first.write(step, "main", {"loss": 1.0 / step})
  first.close()
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 4, "ph')  # killed
  second = writers.Writer(tmp_path, step=2)
  second.write(3, "main", {"loss": 7.0})
  second.close()
  assert [(row["step"], row["loss"]) for row in writers.read(tmp_path)] == [
    (1, 1.0),
    (2, 0.5),
    (3, 7.0),
  ]


def test_what_is_not_finite_is_a_row_but_no_point_of_a_curve(tmp_path, caplog):
  writer = writers.Writer(tmp_path, step=0)
  with caplog.at_level(logging.WARNING):
    writer.write(1, "main", {"loss": 1.0, "cosine": math.nan})
  writer.close()
  assert not caplog.messages
  (row,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert math.isnan(json.loads(row)["cosine"])
