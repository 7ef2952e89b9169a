"""``robust-mm visualize`` on a few steps of real data."""

import dataclasses
import html.parser
import json
import re
import shutil

import evaluation_results as results
import numpy as np
import pytest
from command_line import run

from robust_mm import cli
from robust_mm.evaluation import visuals
from robust_mm.visualize_job import asking
from robust_mm.visualize_job import job


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_dir):
  """A smoke run of images and sound, evaluated with a grid of each."""
  folder = tmp_path_factory.mktemp("run") / "joint"
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("ROBUST_MM_DATA_DIR", str(data_dir))
    common = ["--config=configs/joint.py:av_digits,smoke"]
    assert cli.main(["train", *common, f"--workdir={folder}"]) == 0
    yield folder


ASKED = ("--label=3,7", "--num-steps=3", "--seeds=2")


def test_grids_numbers_and_page_are_written_and_shown_in_the_report(
  trained, capsys
):
  result = json.dumps(results.make_result("joint"))
  (trained / "results.json").write_text(result)
  assert run(capsys, "report", f"--workdir={trained}")[0] == 0
  before = (trained / "report.html").read_text()
  assert "What activates a class" not in before
  asked = ("visualize", f"--workdir={trained}", "--modality=image", *ASKED)
  code, out, err = run(capsys, *asked)
  assert code == 0, err
  home = trained / visuals.FOLDER
  assert sorted(p.name for p in home.iterdir()) == [
    "image.json",
    "image.npz",
    "image.png",
  ]
  told = json.loads((home / "image.json").read_text())
  assert told["rows"] == [
    *("start 0", "start 1", "none", "shifts only", "sub-pixel shifts"),
    *("Fourier, none", "real item", "class mean"),
  ]
  assert told["columns"] == [3, 7]
  assert told["value_range"] == [0.0, 1.0]
  settings = told["settings"]
  assert settings["num_steps"] == 3
  assert settings["transforms"]["image"]["rotation"] == 15
  assert settings["others"] == "absent"
  assert set(told["numbers"]) == {
    *("synthesised", "none", "shifts only", "sub-pixel shifts"),
    *("Fourier, none", "real items"),
  }
  for values in told["numbers"].values():
    assert 0 <= values["far"] <= values["near"] + 1
  assert set(told["margins"]) == {"audio", "image"}
  made = np.load(home / "image.npz")["synthesised"]
  assert made.shape == (2, 2, 28, 28, 1)
  assert made.min() >= 0
  assert made.max() <= 1
  assert "synthesised" in out
  assert "image.png" in out
  for page in ("visualization.html", "report.html"):
    text = (trained / page).read_text()
    html.parser.HTMLParser().feed(text)
    assert "not what the network sees" in text
    assert len(re.findall("data:image/png;base64,", text)) >= 1
  assert "What activates a class" in (trained / "report.html").read_text()


@pytest.mark.parametrize(
  "options, stems, shown",
  [
    (("--modality=audio", "--others=2"), ["audio-others2"], [1, 28, 28, 1]),
    (
      ("--modality=audio", "--others=average"),
      ["audio-average"],
      [asking.AVERAGED, 28, 28, 1],
    ),
    (
      ("--modality=image", "--others=joint"),
      ["audio-joint", "image-joint"],
      None,
    ),
    (
      ("--modality=image", "--mode=in_place", "--fidelity=published"),
      ["image-in_place-published"],
      None,
    ),
    (
      ("--modality=image", "--split=validation", "--phase=joint"),
      ["image-validation-phase_joint"],
      None,
    ),
  ],
)
def test_every_question_has_a_file_of_its_own(
  trained, capsys, tmp_path, options, stems, shown
):
  folder = tmp_path / "run"
  shutil.copytree(trained, folder)
  shutil.rmtree(folder / visuals.FOLDER, ignore_errors=True)
  common = ("visualize", f"--workdir={folder}", *options, *ASKED)
  code, _, err = run(capsys, *common, "--no-controls")
  assert code == 0, err
  found = sorted((folder / visuals.FOLDER).glob("*.json"))
  assert [path.stem for path in found] == stems
  for path in found:
    told = json.loads(path.read_text())
    assert len(told["rows"]) == 4
    assert told["title"].endswith(", validation items, phase joint") == (
      "validation" in path.stem
    )
    published = "published" in path.stem
    assert told["settings"]["reconstruction"] == published
    if shown is not None:
      assert told["settings"]["others"] == {"image": shown}


def test_a_question_is_told_from_every_other_by_its_file():
  asked = {
    "others": "average",
    "mode": "in_place",
    "objective": "logit",
    "objective_scale": 2.0,
    "parameterization": "fourier",
    "fidelity": "published",
    "transforms": "shifts",
  }
  plain = asking.Question(modality="image")
  names = {job._name("image", plain)}
  for field, value in asked.items():
    names.add(job._name("image", dataclasses.replace(plain, **{field: value})))
  places = [("validation", None), ("train", None), ("test", "joint")]
  for split, phase in [*places, ("train", "joint")]:
    names.add(job._name("image", plain, split, phase))
  joint = dataclasses.replace(plain, others="joint")
  assert job._name("image", joint) not in names
  assert job._name("image", plain, "test", None) == "image"
  assert len(names) == 1 + len(asked) + 4
  assert "image" in names
  assert set(asked) | set(job._DETAIL) == {
    field.name for field in dataclasses.fields(plain)
  }


def test_output_goes_elsewhere_and_leaves_the_run_alone(
  trained, capsys, tmp_path
):
  before = sorted(trained.rglob("*"))
  output = tmp_path / "grid.png"
  asked = ("--modality=image", "--others=joint", *ASKED, "--no-controls")
  code, _, err = run(
    capsys, "visualize", f"--workdir={trained}", *asked, f"--output={output}"
  )
  assert code == 0, err
  assert sorted(path.stem for path in tmp_path.glob("*.png")) == [
    "grid-audio",
    "grid-image",
  ]
  assert sorted(trained.rglob("*")) == before


@pytest.mark.parametrize(
  "options, sentence",
  [
    (("--modality=imag",), "--modality .*Did you mean 'image'"),
    (("--modality=image", "--label=10"), "--label must lie in 0..9, got 10"),
    (("--modality=image", "--label=x"), "--label: must be classes"),
    (("--modality=image", "--others=gone"), "--others: must be absent"),
    (("--modality=image", "--others=100000"), "--others must be an item"),
    (("--modality=image", "--output=x.jpg"), "--output must end in .png"),
    (("--modality=image", "--seeds=0"), "--seeds: must be at least 1"),
    (("--modality=image", "--objective-scale=0"), "--objective-scale: must be"),
    (("--modality=audio", "--transforms=image"), "transforms: image is for"),
    (
      ("--modality=image", "--mode=in_place", "--parameterization=fourier"),
      "--parameterization",
    ),
  ],
)
def test_mistake_is_one_sentence(trained, capsys, options, sentence):
  code, _, err = run(capsys, "visualize", f"--workdir={trained}", *options)
  assert code == 2
  assert err.count("\n") == 1, err
  assert re.search(sentence, err), err


def test_damaged_grid_is_named(tmp_path):
  folder = tmp_path / visuals.FOLDER
  folder.mkdir()
  (folder / "image.json").write_text("{}")
  with pytest.raises(ValueError, match=r"image\.json is damaged"):
    visuals.read(["joint"], [tmp_path])
  assert visuals.read(["joint"], None) == []


def test_configuration_asks_for_grids_of_every_modality(
  trained, capsys, monkeypatch
):
  asked = []
  monkeypatch.setattr(
    job, "run", lambda folder, *, question, **options: asked.append(question)
  )
  given = {"split": "test", "phase": None, "progress": print}
  job.of_evaluation(trained, **given)
  assert asked == []  # off by default
  path = trained / "config.json"
  stored = json.loads(path.read_text())
  stored["evaluation"]["visualize"] = True
  path.write_text(json.dumps(stored))
  job.of_evaluation(trained, **given)
  assert [question["modality"] for question in asked] == ["audio", "image"]
