"""``robust-mm visualize`` on a few steps of real data."""

import dataclasses
import html.parser
import json
import re
import shutil

import evaluation_results as results
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import run

import robust_mm
from robust_mm import cli
from robust_mm import models
from robust_mm import visualization
from robust_mm.evaluation import visuals
from robust_mm.visualize_job import asking
from robust_mm.visualize_job import grids
from robust_mm.visualize_job import job
from robust_mm.visualize_job import measures


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
    "image-class3_7.json",
    "image-class3_7.npz",
    "image-class3_7.png",
  ]
  told = json.loads((home / "image-class3_7.json").read_text())
  assert told["rows"] == [
    *("start 0", "start 1", "none", "shifts only", "sub-pixel shifts"),
    *("Fourier, none", "real item", "class mean"),
  ]
  assert told["columns"] == [3, 7]
  assert told["value_range"] == [0.0, 1.0]
  settings = told["settings"]
  assert settings["num_steps"] == 3
  assert settings["transforms"]["image"]["rotation"] == 15
  assert settings["transforms"]["image"]["jitter"] == 2
  assert settings["others"] == "absent"
  # What turns in from outside is black for all alike.
  assert settings["held_out"]["far"]["fill"] == 0
  assert set(told["numbers"]) == {
    *("synthesised", "none", "shifts only", "sub-pixel shifts"),
    *("Fourier, none", "real items"),
  }
  for values in told["numbers"].values():
    assert 0 <= values["far"] <= values["near"] + 1
  near = {row: values["near"] for row, values in told["numbers"].items()}
  apart = (
    f"made with none: {near['synthesised'] - near['none']:+.3f} (2 classes"
  )
  assert [note for note in told["notes"] if apart in note]
  assert set(told["margins"]) == {"audio", "image"}
  made = np.load(home / "image-class3_7.npz")["synthesised"]
  assert made.shape == (2, 2, 28, 28, 1)
  assert made.min() >= 0
  assert made.max() <= 1
  assert "synthesised" in out
  assert "image-class3_7.png" in out
  for page in ("visualization.html", "report.html"):
    text = (trained / page).read_text()
    html.parser.HTMLParser().feed(text)
    assert "not what the network sees" in text
    # What the numbers mean stands beside them.
    assert "Near: image, fill 0, jitter 2, rotation 15, scale 0.87 to" in text
    assert re.search(r"Margin by modality: audio [+-].*, image [+-]", text)
    assert len(re.findall("data:image/png;base64,", text)) >= 1
  assert "What activates a class" in (trained / "report.html").read_text()


@pytest.mark.parametrize(
  "options, stems, shown",
  [
    (
      ("--modality=audio", "--others=2"),
      ["audio-class3_7-others2"],
      [1, 28, 28, 1],
    ),
    (
      ("--modality=audio", "--others=average"),
      ["audio-class3_7-average"],
      [asking.AVERAGED, 28, 28, 1],
    ),
    (
      ("--modality=image", "--others=joint"),
      ["audio-class3_7-joint", "image-class3_7-joint"],
      None,
    ),
    (
      ("--modality=image", "--mode=in_place", "--fidelity=published"),
      ["image-class3_7-in_place-published"],
      None,
    ),
    (
      ("--modality=image", "--split=validation", "--phase=joint"),
      ["image-class3_7-validation-phase_joint"],
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
    rotation = 10 if "in_place" in path.stem else 15
    if path.stem.startswith("image"):
      assert told["settings"]["transforms"]["image"]["rotation"] == rotation
    assert told["title"].endswith(", validation items, phase joint") == (
      "validation" in path.stem
    )
    published = "published" in path.stem
    assert told["settings"]["reconstruction"] == published
    assert told["settings"]["objective_divisor"] == 1 or not published
    if shown is not None:
      assert told["settings"]["others"] == {"image": shown}
      assert len(told["items"]) == shown[0]
    if path.stem == "audio-class3_7-others2":
      (item,) = told["items"]
      assert item["item"] == 2
      assert told["title"].endswith(f"of item 2, of class {item['class']}")
      names = {n.partition(", ")[2] for n in told["numbers"]} - {""}
      wanted = {"other classes"}
      wanted |= {"class of the item"} if item["class"] in (3, 7) else set()
      assert names == wanted
      assert set(told["margin_means"]) == {"", *names}
      assert set(told["margin_means"][""]) == {"audio", "image"}


def test_an_item_agrees_with_one_class_and_is_against_the_others():
  asked = {"items": [{"item": 0, "id": 5, "class": 7}]}
  margins = {"audio": np.array([[1.0, 3.0], [5.0, 7.0], [-1.0, -3.0]])}
  found = measures.margin_means(margins, (3, 7, 9), asked)
  assert found == {
    "": {"audio": 2.0},
    "class of the item": {"audio": 6.0},
    "other classes": {"audio": 0.0},
  }
  assert list(measures.margin_means(margins, (3, 7, 9), {"items": []})) == [""]


def test_pictures_are_compared_with_those_of_no_transformation():
  """Class by class and start by start: a tenth more wherever it began."""
  without = np.linspace(0.1, 0.7, 12).reshape(6, 2)
  rows = {
    measures.SYNTHESISED: {"near": without + 0.1, "far": without[::-1]},
    measures.CONTROL: {"near": without, "far": without},
  }
  near, far = measures._apart(rows, {"near": None, "far": None})
  assert "none: +0.100, 95 % interval +0.100 to +0.100 (6 classes, 2" in near
  low, high = re.search(r"\+0\.000, .* interval (\S+) to (\S+) ", far).groups()
  assert float(low) < -0.1 < 0.1 < float(high)
  # Of one picture there is no interval.
  one = {row: {"near": v["near"][:1, :1]} for row, v in rows.items()}
  assert "interval" not in measures._apart(one, {"near": None})[0]
  assert measures._apart({measures.SYNTHESISED: {}}, {"near": None}) == []


def test_joint_numbers_are_of_all_modalities_together(
  trained, capsys, tmp_path
):
  options = ("--modality=image", "--others=joint", *ASKED)
  output = tmp_path / "x.png"
  code, _, err = run(
    capsys, "visualize", f"--workdir={trained}", *options, f"--output={output}"
  )
  assert code == 0, err
  told = {
    name: json.loads((tmp_path / f"x-{name}.json").read_text())
    for name in ("audio", "image")
  }
  made = {
    name: np.load(tmp_path / f"x-{name}.npz")["synthesised"] for name in told
  }
  model, params, state, _ = robust_mm.load(trained)
  together = visualization.class_probability(
    model, params, made, [3, 7], modality=("audio", "image"), state=state
  )
  for name, page in told.items():
    numbers = page["numbers"]["synthesised"]
    assert numbers["probability"] == pytest.approx(
      float(together.mean()), abs=1e-4
    )
    alone = visualization.class_probability(
      model, params, made[name], [3, 7], modality=name, state=state
    )
    assert numbers["probability alone"] == pytest.approx(
      float(alone.mean()), abs=1e-4
    )
    assert {"near", "far", "near alone", "far alone"} <= set(numbers)
    held = page["settings"]["held_out"]["far"]
    assert held["image"]["rotation"] == 30
    assert held["audio"]["kind"] == "log_mel"
    # Controls of all at once; what is left out is said.
    assert {"none", "shifts only", "sub-pixel shifts", "real items"} <= set(
      page["numbers"]
    )
    assert any("Fourier" in note for note in page["notes"])
    assert page["settings"]["others"] == "joint"
  first, second = (told[name]["numbers"] for name in told)
  for row in first:
    for what in ("near", "far", "probability"):
      assert first[row][what] == second[row][what]


def test_another_network_judges_and_ranges_and_tuning_are_as_asked(
  trained, capsys, tmp_path
):
  other = tmp_path / "other"
  shutil.copytree(trained, other)
  shutil.rmtree(other / visuals.FOLDER, ignore_errors=True)
  common = ("visualize", f"--workdir={other}", "--modality=image", *ASKED)
  code, out, err = run(
    capsys,
    *common,
    "--no-controls",
    f"--transfer={trained}",
    "--ranges=rotation=5,scale=0.9:1.2",
    "--tuning=num_transforms=2,tv_weight=0.5",
  )
  assert code == 0, err
  (path,) = (other / visuals.FOLDER).glob("*.json")
  assert path.stem == "image-class3_7-rotation5.0-scale_0.9__1.2_-" + (
    "num_transforms2.0-tv_weight0.5"
  )
  told = json.loads(path.read_text())
  settings = told["settings"]
  assert settings["transforms"]["image"]["rotation"] == 5
  assert settings["transforms"]["image"]["scale"] == [0.9, 1.2]
  assert (settings["num_transforms"], settings["tv_weight"]) == (2, 0.5)
  for numbers in told["numbers"].values():
    # The same network says the same.
    assert numbers["other probability"] == pytest.approx(
      numbers["probability"], abs=1e-5
    )
    assert 0 <= numbers["other near"] <= 1
  assert "other near" in out
  code, _, err = run(capsys, *common, f"--transfer={other}")
  assert code == 2
  assert re.search("--transfer=.* is the run itself", err), err


@pytest.fixture
def tiny():
  """A run without files: two images of one class, none of the other."""
  model = models.from_function(
    lambda params, inputs: jnp.stack(
      [inputs["x"].mean((1, 2, 3)), -inputs["x"].mean((1, 2, 3))], axis=1
    ),
    {},
    num_classes=2,
    input_shapes={"x": (8, 8, 1)},
  )
  image = np.linspace(0, 1, 3 * 64, dtype=np.float32).reshape(3, 8, 8, 1)

  def batch(label):
    return {
      "inputs": {"x": image},
      "present": {"x": np.ones(3, bool)},
      "label": np.array(label),
      "id": np.arange(3),
    }

  facts = {
    "input_shapes": {"x": [8, 8, 1]},
    "value_range": {"x": [0.0, 1.0]},
    "kinds": {"x": "float"},
  }
  return asking.Run(
    model=model,
    params={},
    state={},
    facts=facts,
    dataset="digits",
    train=batch([0, 0, 0]),
    test=batch([0, 1, 1]),
  )


def test_a_class_without_training_examples_is_left_blank_and_said(tiny):
  question = asking.Question(modality="x", num_steps=1, seeds=1, controls=False)
  ((array, told, _),) = grids.make(tiny, question, print).values()
  assert told["notes"] == [
    "Class 1 has fewer than 2 training examples of x: no distance.",
    "No training example shows class 1: no class mean.",
  ]
  assert told["numbers"]["synthesised"]["feature_distance"] is not None
  size = array.shape[1] // 2
  assert np.all(array[-size + 2 :, -size + 2 :] == 255)
  assert array[-size + 2 :, : size - 2].min() < 255
  # Pixels are those of held-out tests: two in 28.
  jitter = told["settings"]["transforms"]["x"]["jitter"]
  assert jitter == pytest.approx(2 * 8 / 28)
  assert told["settings"]["held_out"]["near"]["jitter"] == jitter


def test_photos_are_taken_for_what_is_asked(tiny):
  facts = {**tiny.facts, "input_shapes": {"x": [96, 96, 3]}}
  photo = dataclasses.replace(tiny, facts=facts)

  def kind(**asked):
    question = asking.Question(modality="x", **asked)
    return asking._transform(photo, question, "x").kind

  assert kind() == "lucid"
  assert kind(transforms="image") == "image"
  assert kind(fidelity="published") == "image"
  assert kind(transforms="identity") == "identity"


@pytest.mark.parametrize(
  "shape, kind", [((16, 48, 48), None), ((9, 9, 3), "image"), ((48, 48), None)]
)
def test_frames_without_channels_are_no_image(tiny, shape, kind):
  facts = {**tiny.facts, "input_shapes": {"x": list(shape)}}
  assert asking.kind(facts, "digits", "x") == kind
  if kind is None:
    question = asking.Question(modality="x")
    with pytest.raises(ValueError, match="what 'x' is: depth, image, inertial"):
      asking._transform(dataclasses.replace(tiny, facts=facts), question, "x")


def test_a_question_is_told_from_every_other_by_its_file():
  asked = {
    "labels": (3,),
    "others": "average",
    "mode": "in_place",
    "objective": "logit",
    "objective_scale": 2.0,
    "parameterization": "fourier",
    "fidelity": "published",
    "transforms": "identity",
    "ranges": (("rotation", 5.0),),
    "tuning": (("every", 4.0),),
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


@pytest.mark.parametrize(
  ("labels", "name"),
  [
    (None, "image"),
    ((3,), "image-class3"),
    ((3, 4), "image-class3_4"),
    ((7, 3, 5), "image-class7_3_5"),
    (tuple(range(27)), "image-class0_to_26"),
  ],
)
def test_classes_are_in_the_name(labels, name):
  assert (
    job._name("image", asking.Question(modality="image", labels=labels)) == name
  )


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
    (("--modality=image", "--label=3,3"), "--label names class 3 more"),
    (("--modality=image", "--ranges=tilt=3"), "--ranges: image has .*'tilt'"),
    (("--modality=image", "--ranges=rotation"), "--ranges: must be NAME"),
    (("--modality=image", "--tuning=lr=1"), "--tuning must be of .*'lr'"),
    (("--modality=image", "--transfer=nowhere"), "--transfer=nowhere"),
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
