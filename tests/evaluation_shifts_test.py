"""Missing rates, corruptions and contributions of an evaluation."""

import dataclasses

import evaluation_models as toy
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from robust_mm import corruptions
from robust_mm import evaluation
from robust_mm import missing
from robust_mm import modalities
from robust_mm.evaluation import batches
from robust_mm.evaluation import forwards
from robust_mm.evaluation import metrics
from robust_mm.evaluation import shifts
from robust_mm.evaluation import texts
from robust_mm.evaluation import wording

RATES = (0.0, 0.25, 0.5)
PLAIN = {"radii": (), "attack": None, "certificate": None}


def _evaluate(batch, *, sharding=None, **settings):
  model = toy.linear_model()
  params, _ = model.init(jax.random.key(0))
  return evaluation.evaluate(
    model,
    params,
    batch,
    protocol=evaluation.standard(**PLAIN, **settings),
    reference=batch,
    sharding=sharding,
  )


def _accuracy(batch, inputs, present):
  model = toy.linear_model()
  params, _ = model.init(jax.random.key(0))
  inputs = modalities.mask(inputs, present)
  outputs, _ = model.apply(params, {}, inputs, present)
  return float(np.mean(np.argmax(outputs.logits, -1) == batch["label"]))


@pytest.fixture(scope="module")
def batch():
  found = toy.make_batch(60)
  ones = np.ones(60, bool)
  return {**found, "present": {name: ones for name in toy.DIMS}}


@pytest.fixture(scope="module")
def report(batch):
  return _evaluate(
    batch, missing_rates=RATES, missing_seeds=3, corruptions="suite"
  )


def test_nothing_of_it_is_measured_unless_asked(batch):
  results = _evaluate(batch).results
  assert results["missing"] is None
  assert results["corrupted"] is None
  assert "shift_seconds" not in results["timing"]


def test_the_missing_curve_is_that_of_the_stored_seeds(report, batch):
  found = report.results["missing"]
  assert found["seeds"] == [0, 1, 2]
  assert [row["rate"] for row in found["rows"]] == list(RATES)
  for row in found["rows"]:
    rates, digests = [], []
    for seed, accuracy in zip(found["seeds"], row["by_seed"]):
      scores = missing.scores(tuple(toy.DIMS), 60, seed=seed)
      masks = missing.per_sample(scores, row["rate"])
      rates.append(masks.rate)
      digests.append(missing.digest(masks.present))
      expected = _accuracy(batch, batch["inputs"], masks.present)
      assert accuracy == pytest.approx(expected)
    assert row["accuracy"] == pytest.approx(np.mean(row["by_seed"]))
    assert row["achieved"] == pytest.approx(np.mean(rates))
    assert row["digests"] == digests
    assert len(set(digests)) == (3 if row["rate"] else 1)
  clean = report.results["clean"]["accuracy"]
  assert found["rows"][0]["accuracy"] == pytest.approx(clean)


def test_the_settings_say_what_a_suite_had(report, batch):
  assert _evaluate(batch).results["settings"]["corruptions"] is None
  found = report.results["settings"]["corruptions"]
  assert not found["together"]
  assert set(found["kinds"]) == {
    row["kind"] for row in report.results["corrupted"]["rows"]
  }
  for row in report.results["corrupted"]["rows"]:
    strength = found["kinds"][row["kind"]][str(row["severity"])]
    assert strength == row["strength"]


def test_the_first_page_says_what_is_left_of_it(report):
  results = [report.results]
  table = {row["label"]: row["values"] for row in wording.table_rows(results)}
  score = report.results["corrupted"]["score"]
  assert table["corrupted, mean over kinds"] == [f"{score:.4f}"]
  row = report.results["missing"]["rows"][-1]
  label = f"clean, at missing rate {row['rate']:g}"
  assert table[label] == [f"{row['accuracy']:.4f}"]
  assert "corrupted, mean over kinds" in wording.headlines(results)["columns"]
  assert "Corrupted, it is right on" in wording.summary(results)[0]


def test_the_corruption_table_is_that_of_the_suite(report, batch):
  found = report.results["corrupted"]
  suite = corruptions.suite(
    {name: (size,) for name, size in toy.DIMS.items()},
    scale=corruptions.deviations(batch),
  )
  assert len(found["rows"]) == len(suite)
  table = {}
  for row, corruption in zip(found["rows"], suite.values()):
    assert (row["kind"], row["severity"]) == (
      corruption.kind,
      corruption.severity,
    )
    at = row["severity"], *row["modalities"]
    table.setdefault(row["kind"], {})[at] = row["accuracy"]
    if row["severity"] == 5:
      inputs, present = corruption(
        # No attack: the numbers 0 to 2 are left for other stages.
        jax.random.fold_in(jax.random.key(0), 3),
        batch["inputs"],
        batch["present"],
        id=np.arange(60),
        label=batch["label"],
      )
      expected = _accuracy(batch, inputs, present)
      assert row["accuracy"] == pytest.approx(expected)
  assert found["score"] == pytest.approx(metrics.mean_corruption_score(table))


def test_several_devices_and_batch_sizes_find_the_same(report, batch):
  mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,))
  other = _evaluate(
    batch,
    sharding=NamedSharding(mesh, PartitionSpec("data")),
    missing_rates=RATES,
    missing_seeds=3,
    corruptions="suite",
    batch_size=16,
  )
  for entry in ("missing", "corrupted", "contributions"):
    assert other.results[entry] == report.results[entry]


def test_contributions_sum_to_the_accuracy_less_that_of_guessing(report, batch):
  results = report.results
  found = results["contributions"]
  empty = np.bincount(batch["label"]).max() / 60
  assert found["empty"] == pytest.approx(empty)
  total = sum(found["values"].values())
  assert total == pytest.approx(results["clean"]["accuracy"] - empty)
  scores = {k: row["accuracy"] for k, row in results["subsets"].items()}
  expected = metrics.shapley(scores, empty=empty)
  assert found["values"] == pytest.approx(expected)


def test_who_has_nothing_left_counts_as_guessed(batch):
  data = batches.Data(
    inputs={},
    present={},
    label=np.array([1, 1, 0, 2]),
    id=np.arange(4),
    counted=np.array([True, True, True, False]),
  )
  data = dataclasses.replace(data, inputs={"a": None, "b": None})
  everyone = np.ones(4, bool)
  predictions = {
    ("a",): (np.array([-1, 1, 1, 0]), np.array([False, True, True, True])),
    ("b",): (np.array([0, 1, 0, 0]), everyone),
    ("a", "b"): (np.array([1, 1, 0, 0]), everyone),
  }
  found = shifts.contributions(predictions, data)
  # Of the three that count: nothing 2/3, a 2/3, b 2/3, both 1.
  assert found["empty"] == pytest.approx(2 / 3)
  assert found["values"] == pytest.approx({"a": 1 / 6, "b": 1 / 6})
  del predictions["b",]
  assert shifts.contributions(predictions, data) is None


def test_the_report_shows_them(report, batch, tmp_path):
  settings = {"kinds": ["swap", "clip"], "severities": (1, 5)}
  other = _evaluate(batch, missing_rates=(0.5,), corruptions=settings)
  names = {row["kind"] for row in other.results["corrupted"]["rows"]}
  assert names == {"swap", "clip"}
  report.save(tmp_path / "one")
  plots = {path.stem for path in (tmp_path / "one" / "plots").iterdir()}
  assert {"missing", "contributions"} <= plots
  page = (tmp_path / "one" / "report.html").read_text()
  for words in (
    "Missing rates",
    "Mean corruption score",
    "severity 5",
    "scalar gaussian",
    "Contribution of each modality",
    "Accuracy against the missing rate",
  ):
    assert words in page
  before = {**other.results, "name": "earlier"}
  for key in ("missing", "corrupted", "contributions"):
    del before[key]
  path = tmp_path / "both.html"
  evaluation.render([before, report.results], path=path)
  assert "earlier" in path.read_text()


@pytest.mark.parametrize(
  "settings, word",
  [
    ({"missing_rates": (1.5,)}, "missing_rates"),
    ({"missing_seeds": 0}, "missing_seeds"),
    ({"corruptions": "all"}, "corruptions"),
    ({"corruptions": {"kind": ["swap"]}}, "corruptions.*Did you mean"),
    ({"corruptions": {"kinds": ["swapp"]}}, "Did you mean 'swap'"),
  ],
)
def test_a_bad_setting_is_refused_by_name(settings, word):
  with pytest.raises(ValueError, match=word):
    evaluation.standard(**settings)


def test_noise_without_training_data_is_refused(batch):
  model = toy.linear_model()
  params, _ = model.init(jax.random.key(0))
  protocol = evaluation.standard(**PLAIN, corruptions="suite")
  with pytest.raises(ValueError, match="reference is missing"):
    evaluation.evaluate(model, params, batch, protocol=protocol)


def test_all_modalities_at_once(batch):
  def places(corruptions):
    protocol = evaluation.standard(**PLAIN, corruptions=corruptions)
    shapes = {name: x.shape[1:] for name, x in batch["inputs"].items()}
    made = shifts.corruptions_lib.suite(
      shapes, scale=1.0, **protocol.corruptions
    ).values()
    return {c.modalities for c in made}, {c.correlated for c in made}

  alone, _ = places("suite")
  assert {len(names) for names in alone} == {1}
  together, independent = places("together")
  assert max(map(len, together)) == len(batch["inputs"])
  assert independent == {False}
  assert places("correlated") == (together, {True})


def test_one_kept_is_that_of_its_masks(batch):
  found = _evaluate(
    batch,
    missing_rates=(0.3,),
    missing_seeds=2,
    missing_protocol="one_kept",
  ).results["missing"]
  assert found["protocol"] == "one_kept"
  text = texts.caption("missing", [{"missing": found}])
  assert "One random modality of each example kept" in text
  (row,) = found["rows"]
  for seed, accuracy in enumerate(row["by_seed"]):
    masks = missing.one_kept(tuple(toy.DIMS), 60, 0.3, seed=seed)
    expected = _accuracy(batch, batch["inputs"], masks.present)
    assert accuracy == pytest.approx(expected)


def _data(**inputs):
  size = len(next(iter(inputs.values())))
  ones = np.ones(size, bool)
  return batches.Data(
    inputs=inputs,
    present=dict.fromkeys(inputs, ones),
    label=np.zeros(size, np.int32),
    id=np.arange(size),
    counted=ones,
  )


def _lost(protocol, data, rate):
  """What a model would be shown, and the row."""
  shown = []

  class Forward(forwards.Forward):
    def __init__(self):
      pass

    def __call__(self, seen, rows, names):
      shown.append(seen)
      return seen.label

  settings = evaluation.standard(
    missing_rates=(rate,), missing_seeds=1, missing_protocol=protocol
  )
  bench = shifts.Bench(Forward(), None, data, 32)
  found = shifts.missing(bench, settings, lambda text: None)
  return shown[0], found["rows"][0]


def test_frames_are_lost_of_what_has_time():
  data = _data(
    a=np.ones((500, 20, 2), np.float32),
    b=np.ones((500, 3), np.float32),
    c=np.ones((500, 7), np.int32),
  )
  seen, row = _lost("frames", data, 0.4)
  lost = np.all(seen.inputs["a"] == 0, axis=2)
  assert np.all(lost == np.any(seen.inputs["a"] == 0, axis=2))
  assert abs(lost.mean() - 0.4) < 0.02  # four standard errors
  assert abs(np.mean(seen.inputs["c"] == 0) - 0.4) < 0.04
  np.testing.assert_array_equal(seen.inputs["b"], data.inputs["b"])
  assert all(flag.all() for flag in seen.present.values())
  expected = (lost.sum() + np.sum(seen.inputs["c"] == 0)) / (500 * 27)
  assert row["achieved"] == pytest.approx(expected)


def test_whole_batches_lose_the_same():
  data = _data(**{m: np.ones((320, 3), np.float32) for m in "abc"})
  seen, row = _lost("per_batch", data, 0.3)
  flags = np.stack([seen.present[m] for m in "abc"], 1).reshape(10, 32, 3)
  assert np.all(flags == flags[:, :1])
  assert row["achieved"] == pytest.approx(0.3)


@pytest.mark.parametrize(
  ("settings", "word"),
  [
    ({"missing_protocol": "frame"}, "missing_protocol"),
    ({"missing_protocol": "frames"}, "missing_protocol='frames'"),
    ({"missing_protocol": "per_batch"}, "missing_protocol='per_batch'"),
    (
      {"missing_protocol": "per_batch", "missing_rates": (0.25,)},
      "missing_rates",
    ),
  ],
)
def test_protocols_that_do_not_fit_are_refused(batch, settings, word):
  with pytest.raises(ValueError, match=word):
    _evaluate(batch, **{"missing_rates": (0.3,), **settings})
