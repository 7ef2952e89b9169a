"""Captions, definitions and what recipes do: fixed text, no numbers."""

from collections.abc import Mapping
from collections.abc import Sequence

TITLES = {
  "radius_joint": "Accuracy against the size of a change to all modalities",
  "radius_modalities": "Accuracy when only one modality is changed",
  "subsets": "Accuracy with missing modalities",
  "contributions": "What each modality contributes",
  "missing": "Accuracy against the missing rate",
  "vulnerability": "Which modality is the weak one",
  "region": "Two budgets at once",
  "tightness": "How far beyond its radius an example has to be attacked",
  "training": "Training curves",
}

NOTES = {
  "headlines": (
    "Shares of the test examples that are right: with unchanged inputs "
    "(clean), and when all modalities may change by the size named."
  ),
  "numbers": (
    "Accuracies, as shares of the test examples; a dash means not measured. "
    "Attacked, certified and estimated numbers stand in rows of their own. All "
    "radii and 95\N{NO-BREAK SPACE}% intervals, with the settings of each,"
  ),
}

_CAPTIONS = {
  "radius_modalities": (
    "The same curves when the attacker may touch one modality and the others "
    "stay intact. A modality whose curve drops early is the weak one."
  ),
  "subsets": (
    "Each bar is the accuracy when only the named modalities are available; "
    "the others are marked as absent and no value of them is used. Thin lines "
    "are 95 % intervals."
  ),
  "contributions": (
    "The mean gain in clean accuracy from adding a modality, over all orders "
    "in which they could be added (Shapley values): together they are the "
    "accuracy with all, less that of always saying the commonest class."
  ),
  "missing": (
    "The line is the mean over several masks, which are the same for every "
    "model; the band reaches from the lowest to the highest of them."
  ),
  "vulnerability": (
    "Where there is a bound: each modality's share of the squared sensitivity "
    "of the decision at the nearest other class, averaged over examples (the "
    "shares sum to 1 and depend on the units). Where there is an attack: the "
    "accuracy lost when it may change only this modality."
  ),
  "region": (
    "The share of test examples that are right and stay right when the "
    "modality on the horizontal axis may change by up to the size there and, "
    "at the same time, the other one by up to the size on the vertical axis. "
    "Along a black line the share is the number on it."
  ),
  "tightness": (
    "Each example is attacked at multiples of its own joint radius. At a "
    "certified radius itself, marked by the vertical line, no prediction may "
    "flip; the sooner the curve rises beyond it, the less robustness the "
    "radius leaves unproven."
  ),
  "training": (
    "First, what each phase of each recipe minimised: different quantities, so "
    "each has a panel. The panels on validation data can be compared between "
    "runs; vertical lines mark where a phase starts. Certified accuracy there "
    "is that at the radius by which the best model was chosen."
  ),
}

_HOW = {
  "attacked": (
    "The line with markers is what was left after an attack searched for a "
    "harmful change of at most that size: the true robust accuracy lies at or "
    "below it, and each value holds until the next radius that was tried."
  ),
  True: (
    "The dashed line is certified: the true robust accuracy lies at or above "
    "it, whatever the attacker does."
  ),
  False: "The dotted line is only an estimate and guarantees nothing.",
}

# Of a token transformer, whatever its task.
OF_TOKENS = {
  "pretrain-mae": "masked tokens told from the rest, without labels",
  "pretrain-contrastive": (
    "modalities of one example told from those of others, without labels"
  ),
  "pretrain-both": "masked tokens and contrasts, without labels",
  "probe": "a linear head on frozen features",
  "finetune": "all parameters, from a fresh head",
  "lp_ft": "all parameters, from a head that was fitted first",
  **{
    f"masd-{teacher}": (
      "fine-tuned, with what is said of labelled modalities as the teacher of "
      "other sets"
    )
    for teacher in ("self", "ema", "frozen")
  },
}
_RECIPES = {
  "joint": "cross-entropy on all modalities together, the usual baseline",
  "joint-dropout": (
    "cross-entropy, with a random subset of the modalities for each example"
  ),
  "joint-adversarial": "cross-entropy on inputs that an attack has changed",
  "joint-mixup": "cross-entropy on mixtures of two examples",
  "joint-noise": (
    "cross-entropy on noisy inputs, the base model of randomised smoothing"
  ),
  "modal_immune": (
    "cross-entropy on sets of modalities, one of which is attacked on purpose: "
    "removed, damaged or its embeddings collapsed, as configured"
  ),
  "certified_radius": "trained for a large certified radius",
  "captioning": "cross-entropy of every letter of a caption",
  **OF_TOKENS,
}
# Recipes whose names have variants behind a hyphen.
_FAMILIES = {
  "crmt": (
    "certified robust multimodal training: enlarges every modality's own "
    "margin, then weighs modalities by how reliable they are"
  ),
  "nullspace": (
    "cross-entropy, then fine-tuned with noise on tokens that the network "
    "ignores, or as the control that the name says"
  ),
}


def recipe(name: str | None) -> str:
  """A recipe's name and, where it is one of this package, what it does."""
  if name is None:
    return "not stated"
  base, _, penalty = name.partition(" + ")
  kind = base.partition("-")[0]
  text = _FAMILIES.get(kind) or _RECIPES.get(base)
  if penalty:
    text = f"{text or base}, and a penalty of the wrong logits"
  return f"{name}: {text}" if text else name


def lost(results: Sequence[Mapping]) -> str:
  """What goes missing at a missing rate, by the protocols of the results."""
  found = [result["missing"] for result in results if result.get("missing")]
  kinds = dict.fromkeys(row["protocol"] for row in found)
  return " ".join(f"{LOST[kind]}." for kind in kinds)


def caption(name: str, results: Sequence[dict]) -> str:
  """What a figure shows and how to read it, only of lines that are there."""
  if name == "missing":
    return f"{lost(results)} {_CAPTIONS[name]}"
  if name != "radius_joint":
    return _CAPTIONS[name]
  parts = ["The higher and flatter, the better."]
  if any(result["attacked"] for result in results):
    parts.append(_HOW["attacked"])
  parts += [_HOW[kind] for kind in (True, False) if kind in _sounds(results)]
  parts.append(
    "Shaded bands are 95 % intervals for the number of test examples."
  )
  return " ".join(parts)


def glossary(results: Sequence[dict]) -> list[tuple[str, str]]:
  """Terms and what they mean here; only those that this report uses."""
  terms = [
    ("modality", "One of the inputs the model combines, such as image."),
    (
      "clean accuracy",
      "The share of test examples whose true class the model predicts, "
      "with unchanged inputs.",
    ),
    ("size of a change, radius", _radius(results)),
    (
      "attacked accuracy",
      "The share that is right and stays right under the strongest change an "
      "attack found. A stronger attack could find more: it is an upper limit "
      "of the true robust accuracy.",
    ),
  ]
  if True in _sounds(results):
    terms.append(
      (
        "certified accuracy",
        "The share that is right and for which it is proven that no change "
        "up to the radius alters the prediction: a lower limit of the true "
        "robust accuracy. It is about the input arrays the model receives, "
        "not about the world before them.",
      )
    )
  if False in _sounds(results):
    terms.append(
      (
        "estimated accuracy",
        "The same formula with constants estimated from data. It is no lower "
        "limit of anything and proves nothing.",
      )
    )
  if any(result.get("smoothed") for result in results):
    terms.append(
      (
        "smoothed classifier, certified with probability",
        "It answers with the class that the model gives most often when noise "
        "is added to its inputs, or abstains. Its accuracies are about it and "
        "not about the model itself. Each example's radius is wrong with at "
        "most the probability that is missing to 1, because the noise is "
        "drawn.",
      )
    )
  return [
    *terms,
    (
      "95 % interval",
      "Wilson's interval: what the accuracy could be on other examples of "
      "the same kind.",
    ),
  ]


def _sounds(results: Sequence[dict]) -> set[bool]:
  return {row["sound"] for result in results for row in result["certified"]}


def _radius(results: Sequence[dict]) -> str:
  text = (
    "How far an input may move, divided by its modality's unit. All changed: "
    "all modalities share one ball of that size."
  )
  if any(result["settings"]["units"] == "relative" for result in results):
    text += (
      " A unit is the median distance of a training example from the mean of "
      "all, in that modality."
    )
  norms = {result["settings"]["norm"] for result in results}
  if 2 in norms:
    text += (
      " In l2 it is the Euclidean length, the root of the sum of the squared "
      "changes of all entries."
    )
  if "inf" in norms:
    text += (
      " In linf a change is as large as the largest change of one entry, so a "
      "joint ball lets every entry of every modality move that far at once."
    )
  return text


# What is lost at a missing rate, by protocol.
LOST = {
  "per_sample": "Random modalities of each example absent, at least one left",
  "one_kept": "One random modality of each example kept, others by chance",
  "per_batch": "Batches of 32 examples without one or two of three modalities",
  "frames": "Random frames of every modality that has time replaced by zeros",
}
