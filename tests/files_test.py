"""Files appear whole or not at all, and hold what they were given."""

import csv
import json
import math
import os

import numpy as np
import pytest

from robust_mm import _files


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
  path = tmp_path / "results.json"
  _files.write_json(path, {"a": 1})

  def fail(*_):
    raise OSError("disk full")

  monkeypatch.setattr(os, "replace", fail)
  with pytest.raises(OSError, match="disk full"):
    _files.write_json(path, {"a": 2})
  assert json.loads(path.read_text()) == {"a": 1}
  assert list(tmp_path.iterdir()) == [path]


def test_json_is_strict_unless_asked_and_refuses_before_it_writes(tmp_path):
  path = tmp_path / "a.json"
  for value in (math.nan, math.inf):
    with pytest.raises(ValueError, match="JSON"):
      _files.write_json(path, {"a": value})
  assert list(tmp_path.iterdir()) == []
  _files.write_json(path, {"b": math.nan, "a": math.inf}, allow_nan=True)
  assert math.isnan(json.loads(path.read_text())["b"])


def test_json_keeps_the_order_of_keys_or_sorts_them(tmp_path):
  value = {"b": 1, "a": {"d": 2, "c": 3}}
  kept = _files.write_json(tmp_path / "kept", value).read_text()
  ordered = _files.write_json(tmp_path / "s", value, sort_keys=True).read_text()
  assert list(json.loads(kept)) == ["b", "a"]
  assert list(json.loads(ordered)) == ["a", "b"]
  assert list(json.loads(ordered)["a"]) == ["c", "d"]


def test_columns_give_back_every_float32(tmp_path):
  rng = np.random.default_rng(0)
  values = rng.normal(size=50) * 10.0 ** rng.integers(-9, 9, size=50)
  values = values.astype(np.float32)
  values[:2] = np.inf, 0
  path = tmp_path / "folder" / "rows.csv"
  flags = values > 0
  _files.write_columns(path, {"x,y": values, "flag": flags, "w": ["l2"] * 50})
  with path.open(newline="") as file:
    rows = list(csv.DictReader(file))
  read = np.array([float(row["x,y"]) for row in rows], np.float32)
  np.testing.assert_array_equal(read, values)
  assert [row["flag"] for row in rows] == [str(int(flag)) for flag in flags]
  assert {row["w"] for row in rows} == {"l2"}


def test_a_file_is_as_readable_as_any_other(tmp_path):
  (tmp_path / "plain").write_text("")
  path = _files.write_bytes(tmp_path / "ours", b"")
  assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_refused_write_names_the_file_that_was_asked_for(tmp_path):
  (tmp_path / "taken").mkdir()
  with pytest.raises(OSError) as caught:
    _files.write_bytes(tmp_path / "taken", b"x")
  assert str(tmp_path / "taken") in str(caught.value)
  assert ".tmp" not in str(caught.value)
  assert list(tmp_path.iterdir()) == [tmp_path / "taken"]


def test_a_folder_without_room_for_a_file_says_why(tmp_path):
  assert _files.refusal(tmp_path) is None
  assert list(tmp_path.iterdir()) == []
  assert "No such file" in _files.refusal(tmp_path / "nowhere")
