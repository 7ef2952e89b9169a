"""What a study's methods are as configurations, and what they cost."""

import functools
import inspect

import jax
import numpy as np
import pytest

from robust_mm import config as config_lib
from robust_mm import modalities
from robust_mm import recipes
from robust_mm import shift_methods
from robust_mm import shift_study
from robust_mm.data import registry
from robust_mm.shift_study import budgets
from robust_mm.shift_study import making
from robust_mm.training import recipe as recipe_lib
from robust_mm.training import runs
from robust_mm.training import setup as setup_lib
from robust_mm.training import sharding
from robust_mm.training import state as state_lib
from robust_mm.training import steps
from robust_mm.training import streams

SPEC = "configs/shift.py:digits,smoke"


def test_pretraining_sees_the_examples_of_the_study_and_no_others():
  config = config_lib.load(
    "configs/shift.py:av_digits",
    [
      "--config.data.name=av_digits/speaker_disjoint",
      "--config.data.max_train_examples=300",
      "--config.data.missing_rate=0.25",
      "--config.data.batch_size=8",
      "--config.data.train_splits=train,validation",
      "--config.selection.metric=last",
    ],
  )
  found = shift_methods.pretraining(config, seed=3)
  assert found.data.name == "av_digits/speaker_disjoint"
  assert found.data.max_train_examples == 300
  assert found.data.missing_rate == 0.25
  assert found.data.train_splits == ("train", "validation")
  assert found.selection.metric == "last"
  assert found.data.batch_size == 256  # its own
  assert found.seed == 3


def test_no_test_speaker_is_pretrained_on(data_dir):
  name = "av_digits/speaker_disjoint"
  for argument in ("av_digits", name):
    config = config_lib.load(
      f"configs/shift.py:{argument}",
      [f"--config.data.name={name}", f"--config.data.path={data_dir}"],
    )
    before = shift_methods.pretraining(config)
    seen = setup_lib.open_split(before, "train").metadata["speaker"]
    tested = setup_lib.open_split(config, "test").metadata["speaker"]
    assert not {*seen} & {*tested}


@pytest.mark.parametrize(
  "name", ["av_digits/hard", "av_digits/speaker_disjoint"]
)
def test_other_splits_of_av_digits_are_named_in_every_file(name):
  for file in ("shift", "masd", "finetune", "pretraining"):
    there = config_lib.load(f"configs/{file}.py:{name}")
    base = config_lib.load(f"configs/{file}.py:av_digits")
    assert there.data.name == name
    assert there.num_epochs == base.num_epochs
  study = config_lib.load(f"configs/shift.py:{name}").study
  assert study.pretraining.endswith(f":{name}")
  assert study.cluster in registry.get(name).metadata


def test_numbers_are_not_relabelled_with_another_pretraining(tmp_path):
  config = config_lib.load(SPEC, ["--config.study.seeds=2"])
  study = shift_study.prepare(config, tmp_path)
  runs.save_config(study.start(1), shift_methods.pretraining(config, 1))
  shift_study.prepare(config, tmp_path)
  config.study.pretraining = "configs/pretraining.py:digits,contrastive,smoke"
  with pytest.raises(
    ValueError, match=r"config\.study\.pretraining: .*objective"
  ):
    shift_study.prepare(config, tmp_path)


@pytest.mark.parametrize("name", sorted(shift_methods.OPTIONS))
def test_what_recipes_take_is_what_their_signatures_say(name):
  takes = inspect.signature(getattr(recipes, name)).parameters
  given = {"model", "num_steps", "tx", "restraint"}  # by the run
  given |= {"labelled", "unlabelled_ratio"} if name == "masd" else set()
  assert {*shift_methods.OPTIONS[name]} == {*takes} - given
  assert takes["probe_steps"].default == shift_methods.PROBE_STEPS
  assert takes["method"].default == "lp_ft"


def test_options_of_a_method_are_its_own():
  config = config_lib.load(
    "configs/shift.py:digits",
    [
      "--config.study.options.masd.weight=3.0",
      "--config.study.options.dropout.dropout_rate=0.5",
      "--config.recipe.options.probe_lr=0.5",
    ],
  )
  shift_methods.check(config)
  for name, key, value in (
    ("masd", "weight", 3.0),
    ("masd_supersets", "weight", None),
    ("dropout", "dropout_rate", 0.5),
    ("oracle", "dropout_rate", 1.0),
    ("finetune", "dropout_rate", None),
  ):
    both = ("left", "right")
    made = shift_methods.configured(config, name, both, both)
    assert made.recipe.options.get(key) == value
    assert made.recipe.options.probe_lr == 0.5
    assert "study" not in made


def test_an_option_that_makes_a_method_is_not_changed():
  config = config_lib.load(
    "configs/shift.py:digits",
    ["--config.study.options.masd_supersets.teacher_subset=labelled"],
  )
  with pytest.raises(ValueError, match="teacher_subset must be left out"):
    shift_methods.check(config)


@pytest.mark.parametrize("value", ["-1.0", "much"])
def test_values_of_options_are_refused_before_anything_is_trained(
  value, tmp_path
):
  config = config_lib.load(
    SPEC, [f"--config.study.options.masd.weight={value}"]
  )
  with pytest.raises(ValueError, match=r"study\.options\.masd "):
    shift_study.prepare(config, tmp_path)
  assert not [*tmp_path.iterdir()]


def test_an_oracle_lies_in_one_folder_for_all_sets(tmp_path):
  config = config_lib.load(SPEC, ["--config.study.methods=finetune,oracle"])
  study = shift_study.prepare(config, tmp_path)
  places = {study.place("oracle", train, 0) for train in study.train_sets}
  assert places == {tmp_path / "runs" / "oracle" / "left+right" / "0"}
  (place,) = places
  made = making._configured(study, "oracle", ("left",), 0)
  made.optimizer.lr = 0.5
  place.mkdir(parents=True)
  (place / "logits.npz").write_bytes(b"")
  assert not making.is_made(study, "oracle", ("left",), 0)
  runs.save_config(place, made)
  assert making.is_made(study, "oracle", ("left",), 0)
  with pytest.raises(ValueError, match=r"optimizer\.lr"):
    making.logits(study, "oracle", ("left",), 0)


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_what_equals_plain_fine_tuning_is_trained_once(rate, tmp_path):
  config = config_lib.load(
    SPEC,
    [
      "--config.study.methods=finetune,dropout,masd,oracle",
      f"--config.study.options.dropout.dropout_rate={rate}",
    ],
  )
  study = shift_study.prepare(config, tmp_path)
  for train in study.train_sets:
    place = study.place("dropout", train, 0)
    same = place == study.place("finetune", train, 0)
    assert same == (len(train) == 1)
    own = "finetune" if same else "dropout"
    assert place == tmp_path / "runs" / own / "+".join(train) / "0"
    assert study.place("masd", train, 0).parts[-3] == "masd"
    assert study.place("oracle", train, 0).parts[-3] == "oracle"


def test_passes_are_charged_by_sets_ratio_and_teacher():
  config = config_lib.load("configs/shift.py:utd_mhad")
  config.num_epochs = 80
  names = ("depth", "inertial", "skeleton")
  for ratio in (1, 2):
    config.data.unlabelled_ratio = ratio
    for name, labelled, expected in (
      ("finetune", names[:1], 3),
      ("oracle", names[:1], 3),
      ("masd", names[:1], 3 * (1 + ratio) + ratio),
      ("masd_control", names[:1], 3 * (1 + ratio) + ratio),
      ("masd_supersets", names[:1], 3 * (1 + ratio) + 4 * ratio),
      ("masd_supersets", names[:2], 3 * (1 + ratio) + 2 * ratio),
      ("masd_supersets", names, 3 * (1 + ratio) + ratio),
      ("masd_labelled", names[:2], 7),
    ):
      made = shift_methods.configured(config, name, labelled, names)
      assert shift_methods.passes(made, 3) == expected
      assert made.num_epochs == round(80 * 3 / expected)


@pytest.mark.parametrize("num_steps", [0, 2800])
def test_smaller_batches_pay_for_an_update_as_fewer_epochs_do(num_steps):
  config = config_lib.load("configs/shift.py:av_digits/hard,few")
  assert config.study.equal_cost == "batch"
  names = ("audio", "image")
  config.num_steps, config.num_epochs = num_steps, 0 if num_steps else 32
  made = shift_methods.configured(config, "masd", names[:1], names)
  plain = shift_methods.configured(config, "finetune", names[:1], names)
  assert (plain.data.batch_size, plain.num_steps) == (64, num_steps)
  assert made.data.batch_size == 27  # 64 * 3 / 7
  assert made.num_steps == num_steps
  assert made.num_epochs == (0 if num_steps else 14)  # 32 * 3 / 7
  said = budgets.lines(config, names, [names[:1]])
  (line,) = [text for text in said if text.startswith("masd:")]
  # An epoch has all rows, an update 27 of 64.
  length, cost = ("2800 steps", "0.98") if num_steps else ("14 epochs", "2.33")
  wanted = f"{length} in batches of 27; each costs {cost} times one of"
  assert f"then {wanted} finetune." in line
  # As many updates, and as many passes.
  updates = [c.num_epochs / c.data.batch_size or 1 for c in (made, plain)]
  assert abs(updates[0] / updates[1] - 1) < 0.05
  rows = [
    (c.num_epochs or c.data.batch_size) * shift_methods.passes(c, 2)
    for c in (made, plain)
  ]
  assert abs(rows[0] / rows[1] - 1) < 0.03


def test_batches_that_do_not_divide_over_the_devices_are_refused(tmp_path):
  """Before the methods with whole batches have been trained."""
  words = ["--config.study.equal_cost=batch", "--config.mesh.data=2"]
  config = config_lib.load(SPEC, words)  # 16, of which masd has 7
  with pytest.raises(ValueError, match="is 16, of which masd has 7"):
    shift_study.prepare(config, tmp_path)
  assert not [*tmp_path.iterdir()]
  config.data.batch_size = 14
  shift_study.prepare(config, tmp_path)
  config.data.batch_size = 13  # nor over the methods with whole ones
  with pytest.raises(ValueError, match="of which finetune has 13"):
    shift_study.prepare(config, tmp_path)


def test_an_equal_cost_of_another_name_is_refused():
  config = config_lib.load(SPEC, ["--config.study.equal_cost=epoch"])
  with pytest.raises(ValueError, match=r"study\.equal_cost must be one of"):
    shift_methods.check(config)


def test_budgets_say_what_differs_by_the_size_of_a_set():
  config = config_lib.load("configs/shift.py:utd_mhad")
  config.num_epochs = 80
  names = ("depth", "inertial", "skeleton")
  sets = modalities.subsets(names)
  sets = [tuple(sorted(subset)) for subset in sets]
  said = budgets.lines(config, names, sets)
  head = "1000 updates of the head on all training examples"
  assert f"finetune: {head}, then 80 epochs." in said
  assert f"probe: {head}." in said
  assert (
    f"masd: {head}, then 34 epochs; each costs 2.33 times one of finetune."
  ) in said
  for size, epochs, cost in ((1, 24, "3.33"), (2, 30, "2.67"), (3, 34, "2.33")):
    assert (
      f"masd_supersets, T of {size}: {head}, then {epochs} epochs; each costs "
      f"{cost} times one of finetune."
    ) in said
  assert f"oracle: {head}, then 80 epochs; one model for all T." in said
  (ensemble,) = [line for line in said if line.startswith("ensemble")]
  assert "up to 3 times" in ensemble
  found = budgets.budgets(config, names, sets)
  assert [e["models"] for e in found["ensemble"]] == [1, 2, 3]
  assert found["masd"][0]["sizes"] == [1, 2, 3]
  assert not {"wise_ft", "class_mean"} & {*found}


def test_an_update_costs_the_flops_it_is_charged(monkeypatch):
  # XLA counts the body of a loop once.
  scan = functools.partial(jax.lax.scan, unroll=True)
  monkeypatch.setattr(jax.lax, "scan", scan)
  config = config_lib.load(SPEC, ["--config.data.unlabelled_ratio=2"])
  names = ("left", "right")
  flops = []
  for method in ("finetune", "masd", "masd_supersets", "masd_labelled"):
    made = shift_methods.configured(config, method, ("left",), names)
    flops.append(_flops(made) / shift_methods.passes(made, len(names)))
  np.testing.assert_allclose(flops[1:], flops[0], rtol=0.03)


def test_a_control_that_is_taught_nothing_moves_as_fine_tuning_does():
  config = config_lib.load(SPEC, ["--config.optimizer.name=sgd"])
  moved = {}
  for method in ("finetune", "masd_control", "masd_published"):
    made = shift_methods.configured(
      config, method, ("left",), ("left", "right")
    )
    step, state, batch = _first(made)
    after, _ = jax.jit(step)(state, batch, jax.random.key(0))
    moved[method] = jax.tree.map(np.asarray, after.params)
  apart = {
    method: max(
      jax.tree.leaves(
        jax.tree.map(
          lambda a, b: np.max(np.abs(a - b)), moved["finetune"], moved[method]
        )
      )
    )
    for method in ("masd_control", "masd_published")
  }
  assert apart["masd_control"] < 1e-6
  assert apart["masd_published"] > 1e-5


@pytest.mark.parametrize(
  "labelled, number", [(("left", "right"), 16), (("left",), 0)]
)
def test_without_other_examples_only_parts_of_a_set_are_taught(
  labelled, number
):
  config = config_lib.load(SPEC)
  made = shift_methods.configured(
    config, "masd_labelled", labelled, ("left", "right")
  )
  config_lib.check(made)
  assert not made.data.unlabelled_splits
  step, state, batch = _first(made)
  assert "labelled" not in batch
  _, metrics = jax.jit(step)(state, batch, jax.random.key(0))
  assert float(metrics["distilled"]) == number
  assert np.isfinite(float(metrics["loss"]))


def test_few_of_a_large_set_are_pretrained_on_and_tuned_alike(data_dir):
  config = config_lib.load(
    "configs/shift.py:av_digits/hard,few", [f"--config.data.path={data_dir}"]
  )
  before = shift_methods.pretraining(config)
  for found in (config, before):
    assert found.data.max_train_examples == 6000
    assert found.data.batch_size == 64
    assert found.model.fusion_options.num_layers == 2
    assert found.model.encoders.default.embedding_dim == 64
  small = config_lib.load("configs/finetune.py:av_digits,few,smoke")
  assert small.model.fusion_options.num_layers == 1
  assert config.data.max_eval_examples == before.data.max_eval_examples == 2000
  train = setup_lib.open_split(config, "train").batch()["label"]
  assert len(train) <= 6000
  assert np.ptp(np.bincount(train, minlength=10)) <= 1


def test_mosi_is_drawn_by_video_and_scored_by_balanced_accuracy(
  data_dir, tmp_path
):
  config = config_lib.load(
    "configs/shift.py:mosi,smoke", [f"--config.data.path={data_dir}"]
  )
  study = shift_study.prepare(config, tmp_path)
  assert study.names == ("audio", "text", "video")
  assert len(study.train_sets) == 7
  assert study.score == "balanced_accuracy"
  assert 1 < len(np.unique(study.clusters)) < len(study.clusters)


def _first(config):
  """(step, state, batch) at the beginning of a run's last phase."""
  setup = setup_lib.prepare(config)
  phase = recipe_lib.make(config, setup).phases[-1]
  mesh = sharding.make_mesh(data=1)
  batch = next(iter(streams.training_batches(config, setup, mesh)))
  state = state_lib.initializer(setup.model, phase)(jax.random.key(0))
  return steps.make_train_step(phase), state, batch


def _flops(config):
  """Of one update, by XLA's own count."""
  step, state, batch = _first(config)
  lowered = jax.jit(step).lower(state, batch, jax.random.key(0))
  return lowered.compile().cost_analysis()["flops"]
