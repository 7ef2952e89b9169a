"""The paired bootstrap of a study of modality shift, and its aggregates."""

from typing import Any
from typing import NamedTuple

import numpy as np

from robust_mm.evaluation import shift_inputs
from robust_mm.evaluation import shift_scores
from robust_mm.evaluation import shift_statistics

# With fewer seeds a resample of them says nothing: their range is printed.
MIN_SEEDS = 5
# Numbers held at a time while replicates are computed.
CHUNK = 2**22


class Draws(NamedTuple):
  """Scores of every method, on the test split and in every replicate.

  Attributes:
    scores: ``{method: [seed, T, E]}``.
    matched: ``{method: [seed, E]}``, NaN where there is none.
    drawn: ``{method: [replicate, T, E]}``, means over seeds.
    drawn_matched: ``{method: [replicate, E]}``.
    seeds_drawn: whether replicates draw seeds too.
  """

  scores: Any
  matched: Any
  drawn: Any
  drawn_matched: Any
  seeds_drawn: bool


def bootstrap(study: shift_inputs.Study, num_samples: int, seed: int) -> Draws:
  """One resampling of clusters, and of seeds, for all methods and pairs.

  A method at a time: the draws are made again for each, from the same seed.
  """
  found = Draws({}, {}, {}, {}, study.num_seeds >= MIN_SEEDS)
  for method in study.results:
    run = _prepare(study, method)
    scores, matched = run(np.ones((1, study.num_clusters)))
    found.scores[method], found.matched[method] = scores[0], matched[0]
    kept = [
      [np.einsum("rs,rs...->r...", shares, value) for value in run(weights)]
      for weights, shares in _resamples(study, num_samples, seed)
    ]
    drawn, drawn_matched = (np.concatenate(part) for part in zip(*kept))
    found.drawn[method] = drawn
    found.drawn_matched[method] = drawn_matched
  return found


def _resamples(study, num_samples, seed):
  """Blocks of ``(weights [r, cluster], shares [r, seed])``."""
  num_seeds = study.num_seeds
  columns = num_seeds * study.kinds.size
  chunk = max(1, min(num_samples, CHUNK // max(columns, len(study.cluster))))
  rng = np.random.default_rng(seed)
  for begin in range(0, num_samples, chunk):
    size = min(chunk, num_samples - begin)
    weights = _resample(rng, size, study.num_clusters)
    shares = np.full((size, num_seeds), 1 / num_seeds)
    if num_seeds >= MIN_SEEDS:
      shares = _resample(rng, size, num_seeds) / num_seeds
    yield weights, shares


def aggregates(
  study: shift_inputs.Study,
  draws: Draws,
  chance: float,
  level: float,
  published: bool,
) -> dict[str, Any]:
  """The fields of a report that rest on scores."""
  fields = {
    name: {}
    for name in (
      "values",
      "draws",
      "by_seed",
      "num_undefined",
      "intervals",
      "matched",
      "matched_error",
    )
  }
  ends = [(1 - level) / 2, (1 + level) / 2]
  own = [study.test_sets.index(subset) for subset in study.train_sets]
  rows = np.arange(len(own))
  for method, scores in draws.scores.items():
    source = method if study.reference == "own" else study.reference
    reference = draws.matched[source]
    error = draws.drawn_matched[source].std(axis=0, ddof=1)
    mean = reference.mean(axis=0)
    keep = {
      name: shift_statistics.defined(mean, error, off)
      for name, off in (("corrected", chance), ("raw", 0.0))
    }
    fields["matched"][method], fields["matched_error"][method] = mean, error
    fields["intervals"][method] = np.quantile(draws.drawn[method], ends, axis=0)
    fields["num_undefined"][method] = {
      kind: int(
        np.sum(
          study.pairs(kind) & ~keep["raw" if published else "corrected"][None]
        )
      )
      for kind in study.categories
    }
    levels = {
      "values": (scores.mean(axis=0), mean),
      "draws": (draws.drawn[method], draws.drawn_matched[source]),
      "by_seed": (scores, reference),
    }
    for name, (value, below) in levels.items():
      fields[name][method] = {
        kind: shift_statistics.aggregate(
          value,
          below,
          value[..., rows, own],
          pairs=study.pairs(kind),
          kinds=study.kinds,
          chance=chance,
          **keep,
        )
        for kind in study.categories
      }
  return {
    **fields,
    "scores": draws.scores,
    "seeds_drawn": draws.seeds_drawn,
  }


def _prepare(study, method):
  """``weights [r, cluster] -> ([r, seed, T, E], matched [r, seed, E])``."""
  prepare = shift_scores.scorer(study.score, study.label, study.cluster)
  run = prepare(study.results[method], study.counted[None, None])
  extra = study.matched.get(method, {})
  others = [
    (study.test_sets.index(subset), value) for subset, value in extra.items()
  ]
  more = [
    (column, prepare(value, study.counted[column][None]))
    for column, value in others
  ]
  trained = [
    (row, study.test_sets.index(subset))
    for row, subset in enumerate(study.train_sets)
  ]

  def weighted(weights):
    scores = run(weights)
    matched = np.full((*scores.shape[:2], len(study.test_sets)), np.nan)
    for column, one in more:
      matched[..., column] = one(weights)
    for row, column in trained:
      matched[..., column] = scores[..., row, column]
    return scores, matched

  return weighted


def _resample(rng, size: int, count: int) -> np.ndarray:
  """How often each of ``count`` is drawn in ``size`` resamples."""
  drawn = rng.integers(count, size=(size, count))
  drawn += count * np.arange(size)[:, None]
  found = np.bincount(drawn.ravel(), minlength=size * count)
  return found.reshape(size, count).astype(np.float64)
