r"""Scores under a shift of the set of modalities: the matrix and its views.

s(T -> E) is the score of a model that had labels on the modalities T, evaluated
on the modalities E. :func:`shift_report` takes what every model got right and
gives a :class:`ShiftReport`: the whole matrix, the aggregates of every kind of
shift (``modalities.shift``), their intervals and the differences between
methods.

    report = shift_report({"ft": right, "masd": better}, ["audio", "image"],
                          chance=0.1, reference="ft")
    print(report.table())
    report.improvement("masd", "ft")  # over all shifted pairs, the headline
    report.improvement("masd", "ft", "missing")

The kind "shifted" pools the pairs of missing, added and transfer.

Measured scores on absence; nothing here bounds a perturbation, and corruption
is another question.
"""

import dataclasses
import json
from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any

import numpy as np

from robust_mm import _validate
from robust_mm import modalities
from robust_mm.evaluation import shift_draws
from robust_mm.evaluation import shift_inputs
from robust_mm.evaluation import shift_statistics
from robust_mm.evaluation import shift_texts

FIDELITIES = ("default", "published")
PUBLISHED = ("matched", *shift_statistics.SHIFTED_KINDS)

Subset = tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ShiftReport:
  """The matrix of scores of every method, and every view of it.

  Attributes:
    names: of the modalities, sorted.
    train_sets: T, the rows.
    test_sets: E, the columns.
    categories: kinds of shift that are reported; the first, "shifted", has the
      pairs of missing, added and transfer together.
    kinds: ``[T, E]``, the kind of every pair.
    score: what is measured, larger is better.
    chance: s0.
    reference: the method whose matched scores are the denominators, or "own".
    baseline: the method that others are compared with: the reference as it was
      asked for, or the first method where that is "own".
    fidelity: "default" or "published".
    results: ``{method: [seed, T, E, item]}`` as given, or logits with a last
      axis more.
    scores: ``{method: [seed, T, E]}``.
    intervals: ``{method: [2, T, E]}``, of the mean over seeds.
    matched: ``{method: [E]}``, the denominators s_ref(E -> E).
    matched_error: ``{method: [E]}``, their standard errors.
    values: ``{method: {kind: {statistic: number}}}``.
    draws: the same of ``[replicate]``.
    by_seed: the same of ``[seed]``.
    num_pairs: ``{kind: pairs that were run}``.
    num_undefined: ``{method: {kind: pairs without a ratio}}``.
    num_items: in the test split.
    num_clusters: that are drawn.
    num_seeds: of every method.
    seeds_drawn: whether replicates draw seeds as well (5 or more).
    num_nan: ``{method: predictions with NaN}`` of items that have something of
      E, all of them counted wrong; 0 where results are no logits.
    num_empty: ``{E: items that have nothing of E}``; wrong where NaN.
    skipped_empty: whether these were left out.
    level: of the intervals.
  """

  names: Subset
  train_sets: tuple[Subset, ...]
  test_sets: tuple[Subset, ...]
  categories: tuple[str, ...]
  kinds: np.ndarray
  score: str
  chance: float
  reference: str
  baseline: str
  fidelity: str
  results: Mapping[str, np.ndarray]
  scores: Mapping[str, np.ndarray]
  intervals: Mapping[str, np.ndarray]
  matched: Mapping[str, np.ndarray]
  matched_error: Mapping[str, np.ndarray]
  values: Mapping[str, Any]
  draws: Mapping[str, Any]
  by_seed: Mapping[str, Any]
  num_pairs: Mapping[str, int]
  num_undefined: Mapping[str, Mapping[str, int]]
  num_items: int
  num_clusters: int
  num_seeds: int
  seeds_drawn: bool
  num_nan: Mapping[str, int]
  num_empty: Mapping[str, int]
  skipped_empty: bool
  level: float

  @property
  def methods(self) -> tuple[str, ...]:
    """Their names, in the order given."""
    return tuple(self.scores)

  @property
  def headline(self) -> str:
    """``"pooled"``, or as published ``"relative_raw"``."""
    return "pooled" if self.fidelity == "default" else "relative_raw"

  def matrix(self, method: str) -> np.ndarray:
    """s(T -> E), the mean over seeds, ``[T, E]``."""
    _validate.one_of(self.methods, method=method)
    return self.scores[method].mean(axis=0)

  def ratios(self, method: str) -> np.ndarray:
    """(s - s0) / (s_ref(E -> E) - s0), ``[T, E]``; NaN where undefined.

    As published, s0 is 0 here.
    """
    matrix, chance = self.matrix(method), self.ratio_chance
    keep = self.defined(method)
    below = np.where(keep, self.matched[method] - chance, np.nan)
    return (matrix - chance) / below[None]

  @property
  def ratio_chance(self) -> float:
    """s0 in the ratios of :meth:`ratios` and ``num_undefined``."""
    return self.chance if self.fidelity == "default" else 0.0

  def defined(self, method: str) -> np.ndarray:
    """Where the reference is clear of chance, ``bool[E]``."""
    return shift_statistics.defined(
      self.matched[method], self.matched_error[method], self.ratio_chance
    )

  def strengths(self, method: str) -> dict[str, float]:
    """s({m} -> {m}) of every modality that was trained alone."""
    matrix = self.matrix(method)
    return {
      train[0]: float(matrix[row, self.test_sets.index(train)])
      for row, train in enumerate(self.train_sets)
      if len(train) == 1
    }

  def estimate(
    self,
    method: str,
    kind: str = shift_statistics.SHIFTED,
    statistic: str | None = None,
  ) -> shift_statistics.Estimate:
    """One aggregate with its interval; the headline where none is named."""
    statistic = statistic or self.headline
    self._check([method], kind, statistic=statistic)
    parts = [
      source[method][kind][statistic]
      for source in (self.values, self.draws, self.by_seed)
    ]
    return shift_statistics.summary(*parts, self.level)

  def difference(
    self,
    first: str,
    second: str,
    kind: str = shift_statistics.SHIFTED,
    statistic: str | None = None,
  ) -> shift_statistics.Estimate:
    """``first - second``, taken inside every replicate: a paired interval."""
    statistic = statistic or self.headline
    self._check([first, second], kind, statistic=statistic)
    # Of two infinite ratios the difference is none.
    with np.errstate(invalid="ignore"):
      parts = [
        source[first][kind][statistic] - source[second][kind][statistic]
        for source in (self.values, self.draws, self.by_seed)
      ]
    return shift_statistics.summary(*parts, self.level)

  def improvement(
    self,
    first: str,
    second: str,
    kind: str = shift_statistics.SHIFTED,
    form: str | None = None,
    *,
    corrected: bool | None = None,
  ) -> shift_statistics.Estimate:
    """``first / second``, inside every replicate.

    With one reference the pooled form with chance correction is that of the
    performance: the denominators cancel. NaN where ``second`` is not more than
    two standard errors above 0 (above chance, if ``corrected``); a replicate
    where it is not above 0 counts as infinite.

    Args:
      first: a method.
      second: what it is compared with.
      kind: of shift; "shifted" for missing, added and transfer together.
      form: "pooled", "performance", "worst" or "relative"; None for pooled, as
        published for relative.
      corrected: whether chance is taken off; None for yes, as published for no.

    Raises:
      ValueError: naming the argument.
    """
    default = self.fidelity == "default"
    form = form or ("pooled" if default else "relative")
    corrected = default if corrected is None else corrected
    self._check([first, second], kind, form=form)
    ratio = form in ("pooled", "relative")
    statistic = form if corrected or not ratio else f"{form}_raw"
    off = self.chance if corrected and not ratio else 0.0

    def divide(source):
      above, below = (source[m][kind][statistic] - off for m in (first, second))
      return shift_statistics.quotient(above, below)

    below = self.values[second][kind][statistic] - off
    with np.errstate(invalid="ignore"):
      error = np.std(self.draws[second][kind][statistic], ddof=1)
    if not below > shift_statistics.ERRORS * error:
      return shift_statistics.Estimate(*[np.nan] * 5)
    parts = [divide(part) for part in (self.values, self.draws, self.by_seed)]
    return shift_statistics.summary(*parts, self.level)

  def to_dict(self) -> dict:
    """Everything but what belongs to single items, for JSON; NaN is None."""
    return shift_texts.as_dict(self)

  def to_json(self) -> str:
    """:meth:`to_dict` as text."""
    return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

  def table(self) -> str:
    """Aggregates of every kind, with the whole matrix below, as text."""
    return shift_texts.table(self)

  def _check(self, methods, kind, *, statistic=None, form=None):
    for method in methods:
      _validate.one_of(self.methods, method=method)
    _validate.one_of(self.categories, kind=kind)
    if statistic is not None:
      _validate.one_of(shift_statistics.STATISTICS, statistic=statistic)
    if form is not None:
      _validate.one_of(shift_statistics.FORMS, form=form)


def shift_report(
  results: Mapping[str, Any],
  names: Iterable[str],
  chance: float,
  reference: str,
  *,
  train_sets: Iterable[Any] | None = None,
  test_sets: Iterable[Any] | None = None,
  matched: Mapping[str, Mapping[Any, Any]] | None = None,
  score: str = "accuracy",
  label: Any = None,
  clusters: Any = None,
  present: Mapping[str, Any] | None = None,
  skip_empty: bool = False,
  fidelity: str = "default",
  num_samples: int = 2000,
  level: float = 0.95,
  seed: int = 0,
) -> ShiftReport:
  r"""Scores, aggregates and paired intervals of several methods.

  For the pairs :math:`\Pi_c` of a kind c that were run ("shifted": missing,
  added and transfer together):

  ============  ============================================================
  performance   mean of s(T -> E)
  worst         the smallest; biased low by noise, so compare it only between
                methods on the same pairs, items and number of seeds
  relative      mean of (s(T -> E) - s0) / (s_ref(E -> E) - s0) where defined
  pooled        the sum of numerators over that of denominators, all pairs
  drop, gain    mean of s(T -> T) - s(T -> E) over the missing, of its negative
                over the added, each with the T of its own pair
  ============  ============================================================

  ``relative_raw`` and ``pooled_raw`` are without s0. A pair whose reference is
  within two standard errors of chance has no ratio: NaN in the matrix of
  ratios, left out of ``relative``, counted in ``num_undefined``, and still in
  ``pooled``. Ratios above 1 are legal.

  The intervals are percentiles over ``num_samples`` replicates. Each draws the
  clusters of the test split with replacement, the same ones for every T, E,
  method and seed, and the seeds too where there are 5 or more. Set-level scores
  are computed again in every replicate.

  ``fidelity="published"`` reports matched, missing, added and transfer, with
  the mean of ratios to each method's own matched score without s0 as headline;
  ``reference`` is then what improvements in the page and in JSON are over.

  Args:
    results: ``{method: bool[seed, T, E, item]}``, right or not (or shares in
      [0, 1]). With ``label`` logits ``[seed, T, E, item, k]``.
    names: of all modalities; E runs over all their subsets.
    chance: s0, see ``evaluation.chance_level``.
    reference: the method that gives s_ref(E -> E); "own" for each its own,
      which favours a method that spoils its matched score.
    train_sets: T of every row, names or ``"a+b"``; None for all subsets, in the
      order of ``modalities.subsets``.
    test_sets: E of every column; None for all subsets.
    matched: ``{method: {E: [seed, item]}}`` matched results (or logits) of an E
      that is no row.
    score: "accuracy", "balanced_accuracy", "macro_f1", "map" or
      "auroc".
    label: int ``[item]``, ``bool[item, k]`` for the last two; needed for all
      but accuracy.
    clusters: ``[item]``, whose items are drawn together: speaker, subject,
      video. None for every item by itself.
    present: ``{m: bool[item]}``, what items really have.
    skip_empty: leaves out the items that have nothing of E; else they are
      counted in ``num_empty`` and stay.
    fidelity: "default" or "published".
    num_samples: replicates.
    level: of the intervals.
    seed: of the draws.

  Raises:
    ValueError: naming the argument; also where s_ref(E -> E) is missing for an
      E that is needed.

  References:
    `McKinzie et al. (2023) <https://arxiv.org/abs/2304.04385>`_, whose formulas
    are not published; these are this project's reading.
  """
  _validate.one_of(FIDELITIES, fidelity=fidelity)
  _validate.at_least(2, num_samples=num_samples)
  _validate.in_unit_interval(chance=chance)
  if not 0 < level < 1:
    raise ValueError(f"level must lie in (0, 1), got {level}.")
  published = fidelity == "published"
  study = shift_inputs.read(
    results,
    names,
    reference="own" if published else reference,
    train_sets=train_sets,
    test_sets=test_sets,
    matched=matched or {},
    score=score,
    label=label,
    clusters=clusters,
    present=present,
    skip_empty=skip_empty,
    categories=(
      shift_statistics.SHIFTED,
      *(PUBLISHED if published else modalities.SHIFTS),
    ),
  )
  draws = shift_draws.bootstrap(study, num_samples, seed)
  first = next(iter(study.results))
  return ShiftReport(
    chance=float(chance),
    baseline=first if reference == "own" else reference,
    fidelity=fidelity,
    level=level,
    **study.facts(),
    **shift_draws.aggregates(study, draws, float(chance), level, published),
  )
