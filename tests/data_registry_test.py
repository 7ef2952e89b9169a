"""Names, defaults and the sentences a mistaken user reads."""

import subprocess
import sys

import pytest

from robust_mm import _validate
from robust_mm import data
from robust_mm.data import registry


@pytest.mark.parametrize("name", registry.list_datasets())
def test_entry_is_complete_and_consistent(name):
  info = registry.get(name)
  assert info.description
  assert info.licence
  assert set(info.default_modalities) <= set(info.modalities)
  assert tuple(sorted(info.default_modalities)) == info.default_modalities
  assert len(info.class_names) in (0, info.num_classes)
  assert info.measured == (info.kind == "prepared" and not info.num_classes)
  for modality in info.modalities.values():
    ranks = {"image": 3, "video": 4, "sequence": 2, "spectrogram": 2}
    assert len(modality.shape) == ranks.get(modality.kind, 1)
  if info.kind != "folder" and not info.measured:
    assert tuple(info.splits) == registry.SPLITS


def test_mosi_default_leaves_out_the_features_that_leak_labels():
  info = registry.get("mosi")
  assert info.default_modalities == ("audio", "words")
  assert any("WARNING" in note for note in info.notes)


@pytest.mark.parametrize(
  "call, words",
  [
    (lambda: registry.get("digit"), "Did you mean 'digits'?"),
    (lambda: registry.get("utd-mhad"), "Did you mean 'utd_mhad'?"),
    (lambda: data.open_source("digits", "val"), "Did you mean 'validation'?"),
    (
      lambda: data.open_source("digits", "test", modalities=("lef",)),
      "Did you mean 'left'?",
    ),
    (lambda: data.open_source("digits", "test", limit=0), "limit must be"),
    (
      lambda: data.open_source("digits", "test", modalities=()),
      "at least one modality",
    ),
    (lambda: data.prepare("digits", "anywhere"), "needs no preparation"),
    (lambda: data.prepare("mfeat", "/no/where"), "/no/where is not a folder"),
  ],
)
def test_mistake_is_answered_in_one_sentence(call, words):
  with pytest.raises(_validate.UserError) as caught:
    call()
  assert words in str(caught.value)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["mfeat", "av_digits", "av_digits/hard"])
def test_unprepared_set_tells_the_command(name, tmp_path):
  with pytest.raises(_validate.UserError) as caught:
    data.open_source(name, "train", path=tmp_path)
  assert f"robust-mm data prepare {name} --source=DIR" in str(caught.value)
  assert str(tmp_path) in str(caught.value)


def test_data_directory_comes_from_argument_variable_or_cache(
  monkeypatch, tmp_path
):
  monkeypatch.delenv(registry.DATA_DIR_VARIABLE, raising=False)
  assert registry.data_dir().name == "robust_mm"
  monkeypatch.setenv(registry.DATA_DIR_VARIABLE, str(tmp_path / "a"))
  assert registry.data_dir() == tmp_path / "a"
  assert registry.data_dir(tmp_path / "b") == tmp_path / "b"


def test_mistakes_are_answered_without_heavy_libraries(tmp_path):
  code = f"""
import sys
from robust_mm import data
for call in (
  lambda: data.registry.get("digit"),
  lambda: data.open_source("mosi", "train", path={str(tmp_path)!r}),
  lambda: data.open_source("arrays", "train", path={str(tmp_path)!r}),
):
  try:
    call()
  except ValueError:
    continue
  raise SystemExit("no error")
heavy = {{"jax", "grain", "sklearn", "tensorflow_datasets", "tensorflow"}}
print(sorted(heavy & set(sys.modules)))
"""
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == "[]"


def test_list_names_every_set_and_what_is_prepared(tmp_path):
  text = registry.format_list(tmp_path)
  assert all(name in text for name in data.list_datasets())
  assert "mfeat (not prepared)" in text
