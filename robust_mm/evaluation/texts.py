"""Captions and definitions of a report: fixed text, no numbers."""

from collections.abc import Sequence

FIGURES = {
  "radius_joint": (
    "Accuracy against the size of a change to all modalities",
    "The higher and flatter, the better. The line with markers is what was "
    "left after an attack searched for a harmful change of at most that size: "
    "the true robust accuracy lies at or below it, and each value holds until "
    "the next radius that was tried. The dashed line is "
    "certified: the true robust accuracy lies at or above it, whatever the "
    "attacker does. A dotted line is only an estimate and guarantees nothing. "
    "Shaded bands are 95 % intervals for the number of test examples.",
  ),
  "radius_modalities": (
    "Accuracy when only one modality is changed",
    "The same curves when the attacker may touch one modality and the others "
    "stay intact. A modality whose curve drops early is the weak one. Where "
    "units are used, the upper axis gives the size in raw input values.",
  ),
  "subsets": (
    "Accuracy with missing modalities",
    "Each bar is the accuracy when only the named modalities are available; "
    "the others are marked as absent and no value of them is used. Thin lines "
    "are 95 % intervals.",
  ),
  "vulnerability": (
    "Which modality is the weak one",
    "Left, where there is a bound: each modality's share of the squared "
    "sensitivity of the decision at the nearest other class, averaged over "
    "examples (the shares sum to 1 and depend on the units). And the accuracy "
    "lost when attacks may change only this modality, at its largest radius.",
  ),
  "region": (
    "Two budgets at once",
    "The share of examples that stay right when the first modality may change "
    "by the size on the horizontal axis and, at the same time, the second by "
    "the size on the vertical axis. Lines mark 0.5, 0.7 and 0.9.",
  ),
  "tightness": (
    "How far beyond the radius an attack has to go",
    "Each example is attacked at a multiple of its own radius. Left of 1 no "
    "prediction may flip if the radius is certified; how soon the curve rises "
    "after 1 shows how much of the true robustness the radius accounts for.",
  ),
  "training": (
    "Training curves",
    "Loss and accuracy as they were logged during training. Losses of "
    "different recipes are different quantities. Thin vertical lines mark the "
    "start of a new phase.",
  ),
}


def _radius(results: Sequence[dict]) -> str:
  text = (
    "The largest size of a change to the input. Joint: all modalities together "
    "in one ball. Sizes are divided by each modality's unit."
  )
  if any(result["settings"]["norm"] == "inf" for result in results):
    text += (
      " In linf a change is as large as the largest change of one entry, so a "
      "joint ball lets every entry of every modality move that far at once."
    )
  return text


def glossary(results: Sequence[dict]) -> list[tuple[str, str]]:
  """Terms and what they mean here; only those that this report uses."""
  sound = {row["sound"] for r in results for row in r["certified"]}
  terms = [
    ("modality", "One of the inputs the model combines, such as image."),
    (
      "clean accuracy",
      "The share of test examples whose true class the model predicts, "
      "with unchanged inputs.",
    ),
    ("radius", _radius(results)),
    (
      "attacked accuracy",
      "The share that is right and stays right under the strongest change an "
      "attack found. A stronger attack could find more: it is an upper limit "
      "of the true robust accuracy.",
    ),
  ]
  if True in sound:
    terms.append(
      (
        "certified accuracy",
        "The share that is right and for which it is proven that no change "
        "up to the radius alters the prediction: a lower limit of the true "
        "robust accuracy. It is about the input arrays the model receives, "
        "not about the world before them.",
      )
    )
  if False in sound:
    terms.append(
      (
        "estimated accuracy",
        "The same formula with constants estimated from data. It is no lower "
        "limit of anything and proves nothing.",
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
