"""Captions under attack: what is scored, what moves, what must not."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robust_mm import _validate
from robust_mm import config as config_lib
from robust_mm import evaluation
from robust_mm import models
from robust_mm import protocols
from robust_mm import recipes
from robust_mm.data import sources
from robust_mm.evaluation import batches
from robust_mm.evaluation import caption_scores
from robust_mm.evaluation import prompts
from robust_mm.evaluation import told as told_lib
from robust_mm.models import encoders
from robust_mm.training import setup as setup_lib
from robust_mm.training import sharding
from robust_mm.training import state as state_lib
from robust_mm.training import steps
from robust_mm.training import validation

SHAPES = {"image": (3,), "sound": (3,)}
WORDS = ("one", "two", "six")


@pytest.fixture(scope="module")
def model():
  return models.captioner(
    {m: encoders.mlp(hidden_sizes=(8,), embedding_dim=8) for m in SHAPES},
    3,
    input_shapes=SHAPES,
    words=WORDS,
    width=8,
    num_layers=1,
    num_heads=2,
  )


@pytest.fixture(scope="module")
def batch():
  rng = np.random.default_rng(0)
  label = np.arange(12) % 3
  inputs = {
    m: (0.8 * np.eye(3)[label] + 0.1 * rng.uniform(size=(12, 3))).astype(
      np.float32
    )
    for m in SHAPES
  }
  return {"inputs": inputs, "label": label}


def scored(model, said, classes, present, **options):
  captions = model.captions
  ids = np.stack([captions.ids(text) for text in said])
  return caption_scores.scores(captions, ids, classes, present, **options)


def test_scores_of_known_captions(model):
  classes = {"image": np.array([0, 1, 2, 0]), "sound": np.array([1, 1, 0, 0])}
  present = {"image": np.ones(4, bool), "sound": np.array([1, 1, 1, 0], bool)}
  said = ["one two", "one two", "six one", "one none"]
  found = scored(model, said, classes, present)
  assert found["slots"] == {"image": 0.75, "sound": 1.0}
  assert found["exact_match"] == 0.75
  assert found["distinct_1"] == pytest.approx(4 / 8)
  assert found["distinct_2"] == pytest.approx(3 / 4)
  assert found["entropy"] == pytest.approx(1.5)
  one = scored(model, said, classes, present, slots=("sound",))
  assert one["exact_match"] == 1.0
  assert one["slots"] == {"sound": 1.0}
  # Two, two, one, none: the words that were given do not count.
  assert one["distinct_1"] == pytest.approx(3 / 4)
  assert one["distinct_2"] == 0


def test_a_model_that_says_one_thing_is_not_diverse(model):
  classes = {m: np.zeros(5, int) for m in SHAPES}
  present = {m: np.ones(5, bool) for m in SHAPES}
  found = scored(model, ["one one"] * 5, classes, present)
  assert found["exact_match"] == 1.0
  assert found["entropy"] == 0.0
  assert found["distinct_2"] == pytest.approx(1 / 5)


@pytest.fixture(scope="module")
def params(model, batch):
  """Of a model that spells two different words."""
  recipe = recipes.captioning(model, num_steps=300, tx=optax.adam(1e-2))
  (phase,) = recipe.phases
  step = steps.make_train_step(phase)
  present = {m: jnp.ones(12, bool) for m in SHAPES}
  batch = jax.tree.map(jnp.asarray, {**batch, "present": present})

  @jax.jit
  def run(key):
    state = state_lib.initializer(model, phase)(key)
    body = lambda state, _: (step(state, batch, key)[0], None)  # noqa: E731
    return jax.lax.scan(body, state, length=300)[0].params

  return run(jax.random.key(0))


@pytest.fixture(scope="module")
def watched(model, params, batch):
  """(report, [ids, changed ids, loss before, loss after] of every prompt)."""
  seen, real = [], prompts.substitutions.substitute

  def spy(loss_fn, ids, table, **given):
    changed = real(loss_fn, ids, table, **given)
    losses = [loss_fn(jnp.take(table, x, axis=0)) for x in (ids, changed)]
    keep = lambda *x: seen.append([np.asarray(v) for v in x])  # noqa: E731
    jax.debug.callback(keep, ids, changed, *losses)
    return changed

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(prompts.substitutions, "substitute", spy)
    found = evaluation.caption_report(
      model,
      params,
      batch,
      radii=(0.02, 0.6),
      num_steps=10,
      num_restarts=2,
      num_substitutions=2,
      target="six six",
    )
    jax.effects_barrier()
  return found, seen


@pytest.fixture(scope="module")
def found(watched):
  return watched[0]


@pytest.fixture(scope="module")
def rows(found):
  return {(r["attack"], r["modalities"], r["radius"]): r for r in found["rows"]}


def test_a_report_has_every_attack_of_the_protocol(found):
  rows = [(r["attack"], r["modalities"], r["radius"]) for r in found["rows"]]
  assert rows == [
    ("clean", "", None),
    ("noise", "image+sound", 0.6),
    ("input", "image", 0.02),
    ("input", "image", 0.6),
    ("input", "sound", 0.02),
    ("input", "sound", 0.6),
    ("input", "image+sound", 0.02),
    ("input", "image+sound", 0.6),
    ("one step", "image+sound", 0.6),
    ("queries", "image+sound", 0.6),
    ("targeted", "image+sound", 0.6),
    ("worst case", "image+sound", 0.02),
    ("worst case", "image+sound", 0.6),
    ("prompt, clean", "", None),
    ("text", "", None),
    ("joint", "image+sound", 0.6),
    ("embedding (diagnostic)", "", None),
  ]
  assert found["num_examples"] == 12
  for row in found["rows"]:
    assert 0 <= row["exact_match"] <= 1
    assert row["entropy"] >= 0
    assert (row["success"] is not None) == (row["attack"] == "targeted")
  assert set(found["rows"][0]["slots"]) == set(SHAPES)
  assert set(found["rows"][-2]["slots"]) == {"sound"}


def test_an_attack_spoils_the_word_of_what_it_changes(rows):
  assert rows["clean", "", None]["exact_match"] == 1
  for name in ("image", "sound"):
    assert rows["input", name, 0.02]["exact_match"] == 1
    attacked = rows["input", name, 0.6]["slots"]
    (other,) = set(SHAPES) - {name}
    assert attacked[name] < 0.3
    assert attacked[other] > attacked[name] + 0.3
  assert rows["input", "image+sound", 0.6]["exact_match"] < 0.3


def test_a_targeted_attack_makes_it_say_the_sentence(rows):
  """Which no example is captioned, as classes are shifted."""
  assert rows["targeted", "image+sound", 0.6]["success"] > 0.8


def test_a_changed_prompt_gains_loss_and_changes_its_letters_alone(
  model, watched, rows
):
  assert rows["prompt, clean", "", None]["exact_match"] == 1
  _, seen = watched
  assert len(seen) == 2  # with clean and with changed inputs
  space = model.captions.vocabulary.index(" ")
  for before, after, first, second in seen:
    places = before != after
    assert not np.any(places & (np.cumsum(before == space, axis=1) > 0))
    assert places.any()
    assert places.sum(axis=1).max() <= 2
    assert np.all(second >= first - 1e-5)
    assert second.mean() > first.mean() + 1e-3


OF_INPUTS = ("clean", "noise", "input", "one step", "queries", "targeted")


def test_the_worst_case_is_what_no_row_of_inputs_spoils(found, rows):
  """Example by example: at most any row of its radius or a smaller one."""
  clean = np.array(found["right"]["clean"])
  assert clean.mean() == rows["clean", "", None]["exact_match"]
  smaller, larger = np.array(found["right"]["worst case"])
  assert np.all(larger <= smaller)
  assert np.all(smaller <= clean)
  for left, radius in ((smaller, 0.02), (larger, 0.6)):
    worst = rows["worst case", "image+sound", radius]
    assert left.mean() == worst["exact_match"]
    for (attack, _, reach), row in rows.items():
      if attack not in OF_INPUTS or (reach or 0) > radius:
        continue
      assert worst["exact_match"] <= row["exact_match"] + 1e-9
      for name, share in worst["slots"].items():
        assert share <= row["slots"][name] + 1e-9
  # Nothing of the larger radius counts at the smaller one.
  assert smaller.mean() == 1
  assert larger.mean() < 0.3


def test_noise_is_the_control_of_the_attack(found, rows):
  noise = rows["noise", "image+sound", 0.6]["exact_match"]
  attacked = rows["input", "image+sound", 0.6]["exact_match"]
  assert attacked < noise < 1
  passed = {check["name"]: check["passed"] for check in found["checks"]}
  # Of 12 examples nothing can be said.
  assert passed == {
    "conclusive": False,
    "falls_with_radius": True,
    "many_steps_beat_one": True,
    "gradients_beat_queries": True,
    "attack_beats_noise": 1 - noise <= (1 - attacked) / 2 + 1 / 12 + 1e-6,
  }


def test_who_says_the_target_anyway_is_no_success(model, params, batch):
  """A third of the captions; at a size that changes nothing no other one."""
  report = functools.partial(
    evaluation.caption_report,
    model,
    params,
    radii=(1e-6,),
    num_steps=1,
    num_restarts=1,
    threshold=1.0,
  )
  clean = spelled(model, params, batch)
  found = report(batch, target=clean[0])
  assert found["target_clean"] == pytest.approx(1 / 3)
  (row,) = [r for r in found["rows"] if r["attack"] == "targeted"]
  assert row["success"] == 0
  one = jax.tree.map(lambda x: x[::3], batch)
  said = spelled(model, params, one, mispair=False)
  assert len(set(said)) == 1
  found = report(one, target=said[0], mispair=False)
  assert found["target_clean"] == 1
  (row,) = [r for r in found["rows"] if r["attack"] == "targeted"]
  assert row["success"] is None


def told_of(model, params, batch, mispair=True):
  data = batches.host_data(model, batch)
  return told_lib.Told(model, params, {}, data, mispair)


def spelled(model, params, batch, mispair=True):
  told = told_of(model, params, batch, mispair)
  return model.captions.texts(told.clean)


def test_a_point_is_broken_where_something_else_is_said(model, params, batch):
  """Not where the loss is above zero, as it always is."""
  told = told_of(model, params, batch)
  broken = lambda inputs, ids, **given: np.argmax(  # noqa: E731
    told.raised(*told.loss(params, inputs, ids, ids), ids, **given), axis=1
  )
  assert not broken(told.inputs, told.clean).any()
  assert broken(told.inputs, told.clean, away=False).all()
  moved = told.noise(np.random.default_rng(1), 0.9, (0.0, 1.0))
  moved = {m: np.r_[x[:6], told.inputs[m][6:]] for m, x in moved.items()}
  changed = np.any(told.greedy(moved) != told.clean, axis=1)
  assert changed[:6].any()
  assert not changed[6:].any()
  np.testing.assert_array_equal(broken(moved, told.clean), changed)
  reached = broken(moved, told.clean, away=False)
  np.testing.assert_array_equal(reached, ~changed)


def test_noise_keeps_the_range_and_what_is_absent(model, params, batch):
  present = {m: np.ones(12, bool) for m in SHAPES}
  present["image"][3] = False
  told = told_of(model, params, {**batch, "present": present}, mispair=False)
  moved = told.noise(np.random.default_rng(0), 0.05, (0.0, 1.0))
  for m, x in moved.items():
    change = np.abs(x - told.inputs[m])
    assert x.min() >= 0
    assert x.max() <= 1
    assert change.max() == pytest.approx(0.05, abs=1e-6)
    assert not np.any(change[~present[m]])


def test_the_joint_attack_moves_inputs_for_what_follows_the_prompt(
  model, params, batch, monkeypatch
):
  """The word that is given is not scored, so no step is spent on it."""
  asked, real = [], told_lib.Told.attack

  def spy(self, attack, **given):
    asked.append(given)
    return real(self, attack, **given)

  monkeypatch.setattr(told_lib.Told, "attack", spy)
  evaluation.caption_report(
    model, params, batch, radii=(0.3, 0.1), num_steps=1, num_restarts=1
  )
  # Each modality, both, by one step, by queries, towards the target, joint:
  # nothing runs twice.
  assert len(asked) == 7
  judged, ids = asked[-1]["judged"], np.asarray(asked[-1]["ids"])
  told = told_of(model, params, batch)
  space = model.captions.vocabulary.index(" ")
  given = np.cumsum(told.clean == space, axis=1) == 0
  given |= told.clean == space
  given &= np.cumsum(told.clean == space, axis=1) <= 1
  assert np.all(judged[given] == model.captions.pad)
  np.testing.assert_array_equal(judged[~given], told.clean[~given])
  np.testing.assert_array_equal(ids[~given], told.clean[~given])
  assert np.any(ids[given] != told.clean[given])


def test_a_target_that_cannot_be_spelt_is_refused_before_training():
  config = config_lib.load(
    "configs/captioning.py:digits,smoke",
    ["--config.evaluation.captions.target=six zebras"],
  )
  sentence = r"^config\.evaluation\.captions\.target: text must be of the"
  with pytest.raises(_validate.UserError, match=sentence):
    setup_lib.prepare(config)


def test_a_configuration_names_target_threshold_and_letters(
  model, params, batch
):
  path = "--config.evaluation.captions"
  spec = "configs/captioning.py:digits,smoke"
  config = config_lib.load(
    spec,
    [
      f"{path}.target=six six",
      f"{path}.threshold=0.5",
      f"{path}.num_substitutions=2",
      f"{path}.num_queries=7",
    ],
  )
  protocol = protocols.of_run(config, {"value_range": {}, "units": {}})
  protocol = dataclasses.replace(
    protocol, radii=(), modality_radii=(), attacks=(), subsets=False
  )
  report = evaluation.evaluate(model, params, batch, protocol=protocol)
  found = report.results["captions"]
  assert (found["target"], found["threshold"]) == ("six six", 0.5)
  assert found["settings"]["num_substitutions"] == 2
  assert found["settings"]["num_queries"] == 7
  # Of smoke.
  assert found["settings"]["num_steps"] == 2
  wrong = dataclasses.replace(protocol, captions={"target": "zebra"})
  with pytest.raises(ValueError, match="text must be of the letters"):
    evaluation.evaluate(model, params, batch, protocol=wrong)
  for given in ("threshold=1.5", "num_substitutions=0", "num_steps=0"):
    with pytest.raises(ValueError, match=f"captions.{given.split('=')[0]}"):
      config_lib.load(spec, [f"{path}.{given}"])
  for given in ({"threshold": 2}, {"num_substitutions": 0}, {"words": 1}):
    with pytest.raises(ValueError, match="captions"):
      evaluation.standard(captions=given)


@pytest.mark.parametrize(
  "given, captions",
  [
    ([], 6),
    (["--config.recipe.options.mispair=True"], 6),
    (["--config.recipe.options.mispair=False"], 3),
  ],
)
def test_an_evaluation_pairs_modalities_as_the_run_was_trained(
  model, params, batch, given, captions
):
  """Of sorted classes a shift by one makes three pairs that differ."""
  config = config_lib.load("configs/captioning.py:digits,smoke", given)
  protocol = protocols.of_run(config, {"value_range": {}, "units": {}})
  protocol = dataclasses.replace(
    protocol, radii=(), modality_radii=(), attacks=(), subsets=False
  )
  order = np.argsort(batch["label"], kind="stable")
  batch = jax.tree.map(lambda x: x[order], batch)
  report = evaluation.evaluate(model, params, batch, protocol=protocol)
  clean = report.results["captions"]["rows"][0]
  assert clean["exact_match"] == 1
  assert clean["distinct_2"] == pytest.approx(captions / 12)


@pytest.mark.parametrize("mispair, right", [(True, 10), (False, 11)])
def test_validation_counts_whole_captions_as_the_report_does(
  model, params, batch, mispair, right
):
  """A wrong label spoils two captions in new pairs, and else its own."""
  config = config_lib.load(
    "configs/captioning.py:digits,smoke",
    [
      "--config.evaluation.batch_size=8",
      f"--config.recipe.options.mispair={mispair}",
    ],
  )
  label = np.where(np.arange(12) == 1, 2, batch["label"])
  source = sources.Source(
    name="toy",
    split="validation",
    columns={m: sources.Column(array=x) for m, x in batch["inputs"].items()},
    present=dict.fromkeys(SHAPES),
    labels=label,
    ids=np.arange(12),
    num_classes=3,
    value_range=dict.fromkeys(SHAPES),
  )
  setup = setup_lib.Setup(
    train=source, validation=source, model=model, facts={}, reference={}
  )
  mesh = sharding.make_mesh(data=1)
  found = validation.make(config, setup, mesh)(params, {})
  assert found["exact_match"] == pytest.approx(right / 12)
  batch = {**batch, "label": label}
  report = evaluation.caption_report(
    model, params, batch, radii=(), mispair=mispair
  )
  assert report["rows"][0]["exact_match"] == pytest.approx(right / 12)


@pytest.mark.parametrize(
  "given, message",
  [
    ({"radii": (0.0,)}, "radii must be positive"),
    ({"threshold": 2.0}, "threshold must lie in"),
    ({"target": "zebra"}, "text must be of the letters"),
    ({"max_examples": 0}, "max_examples must be an integer"),
  ],
)
def test_bad_arguments_are_refused(model, batch, given, message):
  with pytest.raises(ValueError, match=message):
    evaluation.caption_report(model, {}, batch, **given)


def test_other_models_have_no_captions(batch):
  plain = models.concat_fusion(
    {m: encoders.mlp(hidden_sizes=(4,), embedding_dim=4) for m in SHAPES},
    3,
    input_shapes=SHAPES,
  )
  with pytest.raises(ValueError, match="caption_report needs a model"):
    evaluation.caption_report(plain, {}, batch)
