"""The words of reports of tasks without attacks: what is measured, and how.

Fixed text; ``pages`` puts the numbers in.
"""

import dataclasses
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence

from robust_mm import _tasks
from robust_mm.evaluation import rows as rows_lib
from robust_mm.evaluation import texts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
  """What the report of a task says.

  Attributes:
    task: as ``Model.task`` says it.
    head: of the table of text.
    words: ``{key of a row: what it is called}``; the first is what rows are
      compared by.
    headline: keys of the clean row that come first.
    constant: what a prediction that knows nothing is called.
    constant_key: its key in the clean row.
    digits: format of a number.
    smaller_is_better: of the first of ``words``.
    predicts: what a model predicts.
    plural: the numbers, in a warning.
    phrase: "it is off by", before two numbers.
    sentence: ``sentence(result, number)``, the summary of a run.
    not_said: facts of a run that are about one class.
    notes: of the page.
    titles: of figures.
    captions: of figures.
    terms: of the glossary.
    optional_terms: ``{key of the clean row: terms}``, where it is measured.
    last_terms: at the end of the glossary.
    recipes: what they minimise.
  """

  task: str
  head: str
  words: Mapping[str, str]
  headline: tuple[str, ...]
  constant: str
  constant_key: str
  digits: str
  smaller_is_better: bool
  predicts: str
  plural: str
  phrase: str
  sentence: Callable[..., str]
  not_said: tuple[str, ...]
  notes: Mapping[str, str]
  titles: Mapping[str, str]
  captions: Mapping[str, str]
  terms: Mapping[str, str]
  optional_terms: Mapping[str, Mapping[str, str]]
  last_terms: Mapping[str, str]
  recipes: Mapping[str, str]

  @property
  def main(self) -> str:
    """What rows are compared by."""
    return _tasks.MAIN[self.task]

  def measured(self, row: Mapping) -> list[str]:
    """The keys that a row has, in order."""
    return [name for name in self.words if name in row]

  def number(self, value) -> str:
    """``45.26``; a dash for None, and NaN as JSON has it."""
    if value is None:
      return "-"
    return value if isinstance(value, str) else f"{value:{self.digits}}"


def of(results: Sequence[Mapping]) -> Vocabulary:
  """That of the task of the results."""
  return _ALL[rows_lib.task(results)]


_NOT_SAID = ("training recipe", "sizes measured in", "attack", "bound")
_TRAINING = texts.TITLES["training"]
_MASKS = (
  "over several masks, which are the same for every model; the band reaches "
  "from the lowest to the highest."
)
_AVAILABLE = (
  "when only the named modalities are available; the others are marked as "
  "absent and no value of them is used."
)
_PANELS = "The panels on validation data can be compared between runs."


def _off_by(result: Mapping, number) -> str:
  clean = result["clean"]
  return (
    f"“{result['name']}” is off by {number(clean['mae'])} on average on "
    f"{clean['num_examples']} test examples with unchanged inputs (correlation "
    f"{number(clean['correlation'])}); the best constant answer would be off "
    f"by {number(clean['best_constant_mae'])}."
  )


def _ranks(result: Mapping, number) -> str:
  clean = result["clean"]
  return (
    f"“{result['name']}” has a mean average precision of "
    f"{number(clean['map'])} on {clean['num_examples']} test examples with "
    f"unchanged inputs, over the {clean['num_classes']} classes that one of "
    "them has; scores that are all the same would have "
    f"{number(clean['constant_map'])}."
  )


_NUMBERS = Vocabulary(
  task=_tasks.REGRESSION,
  head="error",
  words={
    "mae": "MAE",
    "correlation": "correlation",
    "accuracy_7": "Acc7",
    "accuracy_2_nonzero": "Acc2 (non-zero labels)",
    "f1_2_nonzero": "F1 (non-zero labels)",
    "accuracy_2_has_zero": "Acc2 (zero is positive)",
    "f1_2_has_zero": "F1 (zero is positive)",
  },
  headline=("mae", "correlation"),
  constant="best constant",
  constant_key="best_constant_mae",
  digits="#.4g",
  smaller_is_better=True,
  predicts="a number",
  plural="errors",
  phrase="it is off by",
  sentence=_off_by,
  not_said=(*_NOT_SAID, "classes"),
  notes={
    "headlines": "Errors on the test examples, in units of the label.",
    "numbers": (
      "MAE is the mean absolute error, in units of the label, and smaller is "
      "better; of the others larger is. A dash means not measured. All numbers "
      "and 95\N{NO-BREAK SPACE}% intervals, with the settings of each,"
    ),
  },
  titles={
    "subsets": "Error with missing modalities",
    "missing": "Error against the missing rate",
    "training": _TRAINING,
  },
  captions={
    "subsets": (
      f"Each bar is the mean absolute error {_AVAILABLE} Thin lines are 95 % "
      "intervals."
    ),
    "missing": f"The line is the mean absolute error {_MASKS}",
    "training": (
      "First, what each phase of each recipe minimised, in deviations of the "
      f"training labels. {_PANELS}"
    ),
  },
  terms={
    "modality": "One of the inputs the model combines, such as vitals.",
    "MAE": (
      "Mean absolute error: how far predictions are from the labels on "
      "average, in units of the label."
    ),
    "correlation": (
      "Pearson's, of predictions and labels; there is none (nan) where all "
      "predictions are the same."
    ),
    "best constant": (
      "The MAE of always saying the median of the test labels, which no model "
      "knows: what does not beat it has learnt nothing."
    ),
  },
  optional_terms={
    "accuracy_7": {
      "Acc7, Acc2, F1": (
        "Of sentiment in [-3, 3]. Acc7: rounded to seven classes. Acc2 and F1: "
        "two classes, of the labels that are not zero, above zero or not; or "
        "of all, below zero or not. They mean something for such labels only."
      )
    }
  },
  last_terms={
    "95 % interval": (
      "By the standard error of the mean: what the MAE could be on other "
      "examples of the same kind."
    )
  },
  recipes={
    **texts.OF_TOKENS,
    "joint": "L1 on all modalities together, the usual baseline",
    "joint-dropout": "L1, with a random subset of modalities for each example",
    "joint-noise": "L1 on noisy inputs",
    "modal_immune": (
      "L1 on sets of modalities, one of which is attacked on purpose: removed, "
      "damaged or its embeddings collapsed, as configured"
    ),
  },
)

_SEVERAL = Vocabulary(
  task=_tasks.MULTI_LABEL,
  head="mAP",
  words={
    "map": "mAP",
    "hit_at_1": "hit at 1",
    "num_classes": "classes",
  },
  headline=("map", "hit_at_1"),
  constant="same for all",
  constant_key="constant_map",
  digits=".4g",
  smaller_is_better=False,
  predicts=_tasks.PREDICTS[_tasks.MULTI_LABEL],
  plural="numbers",
  phrase="it has",
  sentence=_ranks,
  not_said=_NOT_SAID,
  notes={
    "headlines": "How well the test examples are ranked, class by class.",
    "numbers": (
      "Larger is better. A dash means not measured; there are no intervals. "
      "All numbers, with the settings of each,"
    ),
  },
  titles={
    "subsets": "mAP with missing modalities",
    "missing": "mAP against the missing rate",
    "training": _TRAINING,
  },
  captions={
    "subsets": f"Each bar is the mean average precision {_AVAILABLE}",
    "missing": f"The line is the mean average precision {_MASKS}",
    "training": f"First, what each phase of each recipe minimised. {_PANELS}",
  },
  terms={
    "modality": "One of the inputs the model combines, such as audio.",
    "mAP": (
      "Mean average precision: of each class the area under the curve of "
      "precision over recall as the threshold falls, and the mean over the "
      "classes that a counted example has. Every class weighs alike, however "
      "rare."
    ),
    "hit at 1": (
      "The share of examples whose class of the highest score is one of "
      "theirs; an example without a label is a miss."
    ),
    "same for all": (
      "The mAP of scores that are the same for every example: the share of "
      "examples of a class, averaged. What does not beat it has learnt nothing."
    ),
  },
  optional_terms={},
  last_terms={},
  recipes={
    **texts.OF_TOKENS,
    "joint": "sigmoid cross-entropy on all modalities together, the baseline",
    "joint-dropout": (
      "sigmoid cross-entropy, with a random subset of modalities for each "
      "example"
    ),
    "joint-noise": "sigmoid cross-entropy on noisy inputs",
    "modal_immune": (
      "sigmoid cross-entropy on sets of modalities, one of which is attacked "
      "on purpose: removed, damaged or its embeddings collapsed, as configured"
    ),
  },
)

_ALL = {said.task: said for said in (_NUMBERS, _SEVERAL)}
