r"""Captions under attack: what is still spelled right.

Of token models accuracy is no single number. The attacks here change inputs
(a, b), the words the model is given (c), or both (d); what is scored is the
words that it then says.
"""

import functools
import math
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from robust_mm import _validate
from robust_mm import attacks
from robust_mm._types import Batch
from robust_mm._types import Model
from robust_mm.evaluation import batches
from robust_mm.evaluation import prompts
from robust_mm.evaluation import told as told_lib
from robust_mm.evaluation import verdicts

MAX_EXAMPLES = 128
RADII = (1 / 255, 2 / 255, 4 / 255, 8 / 255)
CLEAN, NOISE, INPUT, TARGETED = "clean", "noise", "input", "targeted"
ONE_STEP, QUERIES, WORST = "one step", "queries", "worst case"
NUM_DRAWS = 10


def caption_report(
  model: Model,
  params: Any,
  batch: Batch,
  *,
  state: Any = None,
  radii: Sequence[float] = RADII,
  num_steps: int = 50,
  num_restarts: int = 5,
  valid_range: Any = (0.0, 1.0),
  target: str | None = None,
  threshold: float = 0.8,
  num_substitutions: int = 1,
  num_queries: int = 200,
  max_examples: int = MAX_EXAMPLES,
  mispair: bool = True,
  seed: int = 0,
) -> dict[str, Any]:
  """What a captioner says, clean and under the attacks of token models.

  - ``noise``: every entry moved by the largest radius, up or down by chance; a
    mean over ten draws;
  - ``input``: linf PGD on the sum of token losses of the clean greedy caption,
    which stays fixed, on each modality alone and on all; of several restarts
    one that has another caption said, then the largest loss;
  - ``one step`` (FGSM) and ``queries`` (Square) on the same of all modalities,
    at the largest radius: what should not do better than PGD;
  - ``targeted``: towards one fixed sentence, on all modalities at the largest
    radius; success: at least ``threshold`` of its letters in their places, of
    the examples of which that is not said as it is;
  - ``worst case``: right under all of these up to a radius, example by example;
  - ``text``: the word of the first slot is given as a prompt, and up to
    ``num_substitutions`` of its letters are changed
    (``attacks.substitute``); what the model goes on with is scored;
  - ``joint``: both, the input at the largest radius, moved to spoil what
    follows the changed prompt, and the prompt tried again there;
  - ``embedding (diagnostic)``: PGD on the embedded prompt, of the length of one
    substitution in l2; no text says such a thing, so it bounds nothing.

  Every row has the words right by slot, whole captions right, and how diverse
  the captions are: a model that says the same of everything changes little
  under attack. METEOR and CIDEr credit synonyms and other orders of words;
  these captions are a word a slot in a fixed order, with one reference, of
  which such scores say nothing that words right and captions right do not.

  >>> found = caption_report(model, params, test)         # doctest: +SKIP
  >>> found["rows"][0]["exact_match"]                     # doctest: +SKIP

  Args:
    model: with ``captions``.
    params: its parameters.
    batch: host arrays, as for :func:`evaluation.evaluate`.
    state: the model's state; None for an empty one.
    radii: linf, in raw units.
    num_steps: of PGD.
    num_restarts: of PGD.
    valid_range: to stay in, see ``attacks.pgd``.
    target: the fixed sentence; the caption of the first class by default.
    threshold: share of its letters that counts as success.
    num_substitutions: letters of the prompt.
    num_queries: of random search.
    max_examples: evenly spaced examples.
    mispair: shift every modality but the first by an example, its class with
      it, so that the words of a caption differ.
    seed: of the attacks.

  Returns:
    ``{"num_examples", "target", "target_clean" (share of clean captions that
    reach it), "threshold", "settings", "rows" [{attack, modalities, radius,
    slots {m: share}, exact_match, distinct_1, distinct_2, entropy, success}],
    "right" {"clean": a list of bool, whether the whole caption of an example is
    right; "worst case" (with radii): such a list for every radius, ascending},
    "checks" [{name, passed, message}]}``; ``success`` of the targeted row
    alone, None where every clean caption reaches the target. The checks are
    those of ``masking_report`` that captions have: of whole captions, on all
    modalities at the largest radius.

  Raises:
    ValueError: a model without captions, or a bad argument.
  """
  data = _data(model, batch, max_examples, radii)
  _validate.at_least(
    1, num_substitutions=num_substitutions, num_queries=num_queries
  )
  _validate.in_unit_interval(threshold=threshold)
  target = _target(model, target)
  told = told_lib.Told(model, params, state or {}, data, mispair)
  common = {"norm": "linf", "budget": 1.0, "valid_range": valid_range}
  pgd = functools.partial(
    attacks.pgd, targets="any", num_steps=num_steps, num_restarts=num_restarts
  )
  key = jax.random.key(seed)
  radii = tuple(sorted(radii)) if told.floats else ()
  inputs = _Inputs(told, pgd(**common), radii, key)
  inputs.measure(seed, valid_range)
  inputs.compare(ONE_STEP, attacks.fgm(**common))
  inputs.compare(QUERIES, attacks.square(num_queries=num_queries, **common))
  reached = inputs.aim(model.captions.ids(target), threshold)
  rows = inputs.rows
  if len(model.captions.slots) > 1:
    asked = prompts.Prompts(told, num_substitutions)
    rows = rows + asked.rows(pgd, common, key, max(radii, default=None))
  return {
    "num_examples": data.size,
    "target": target,
    "target_clean": reached,
    "threshold": threshold,
    "settings": {
      "num_steps": num_steps,
      "num_restarts": num_restarts,
      "num_substitutions": num_substitutions,
      "num_queries": num_queries,
      "mispair": mispair,
      "norm": "linf",
    },
    "rows": rows,
    "right": inputs.right,
    "checks": inputs.checks() if radii else [],
  }


def _data(model, batch, max_examples, radii) -> batches.Data:
  if model.captions is None:
    raise ValueError("caption_report needs a model that spells captions.")
  for radius in radii:
    _validate.positive(radii=radius)
  _validate.at_least(1, max_examples=max_examples)
  data = batches.host_data(model, batch, max_examples=max_examples)
  if not data.counted.any():
    raise ValueError("batch has no example with a modality present.")
  return data.take(np.flatnonzero(data.counted))


def _target(model: Model, target: str | None) -> str:
  """A sentence the model could say; the caption of the first class for None."""
  captions = model.captions
  if not target:
    target = " ".join([captions.words[0]] * len(captions.slots))
  captions.ids(target)
  return target


class _Inputs:
  """The rows of what changes inputs alone, and who is right in all of them."""

  def __init__(self, told, attack, radii, key):
    self._told, self._attack, self._radii = told, attack, radii
    self._key = key
    self.rows = [told.row(CLEAN, told.clean)]
    right, whole = told.right(told.clean)
    self.right = {CLEAN: whole.tolist()}
    self._worst = {r: _Worst(told.clean, right, whole) for r in radii}

  def measure(self, seed, valid_range) -> None:
    """Noise, and PGD on each modality alone and on all."""
    if not self._radii:
      return
    told, largest = self._told, self._radii[-1]
    draws = []
    for number in range(NUM_DRAWS):
      rng = np.random.default_rng([seed, number])
      moved = told.noise(rng, largest, valid_range)
      draws.append(self._say(NOISE, moved, told.floats, largest))
    self.rows.append(_mean(draws))
    for names in dict.fromkeys([*((m,) for m in told.floats), told.floats]):
      away = told.attack(self._attack, names=names)
      for radius in self._radii:
        moved = away(self._key, radius)
        self.rows.append(self._say(INPUT, moved, names, radius))

  def compare(self, name, attack) -> None:
    """The row of another attack on all modalities."""
    if not self._radii:
      return
    told, largest = self._told, self._radii[-1]
    moved = told.attack(attack)(self._key, largest)
    self.rows.append(self._say(name, moved, told.floats, largest))

  def aim(self, wanted, threshold) -> float:
    """The targeted row and the worst cases; the share there without attack."""
    told = self._told
    own = wanted != told.captions.pad

    def reaches(said):
      hits = (said == wanted[None])[:, own]
      return np.mean(hits, axis=1) >= threshold

    already = reaches(told.clean)
    if self._radii:
      largest = self._radii[-1]
      aimed = told.attack(self._attack, towards=wanted)
      moved = aimed(self._key, largest)
      row = self._say(TARGETED, moved, told.floats, largest)
      hits = reaches(told.greedy(moved))[~already]
      success = float(np.mean(hits)) if hits.size else None
      self.rows += [{**row, "success": success}, *self._worst_cases()]
    return float(np.mean(already))

  def checks(self) -> list[dict]:
    """Of whole captions, all modalities changed at the largest radius."""
    names = "+".join(self._told.floats)
    joint = [
      (row["radius"], row["exact_match"])
      for row in self.rows
      if row["attack"] == INPUT and row["modalities"] == names
    ]
    left = {row["attack"]: row["exact_match"] for row in self.rows}
    found = {
      "clean": left[CLEAN],
      "white box": joint[-1][1],
      **{name: left[name] for name in (ONE_STEP, QUERIES, NOISE)},
    }
    number = len(self._told.clean)
    least = verdicts.least(number)
    return [
      verdicts.conclusive(number, found),
      verdicts.falls_with_radius(joint, least),
      *verdicts.rivals(found, least),
    ]

  def _say(self, attack, moved, names, radius):
    told = self._told
    said = told.greedy(moved)
    right, whole = told.right(said)
    for reach, worst in self._worst.items():
      if reach >= radius:
        worst.take(said, right, whole)
    return told.row(attack, said, "+".join(names), radius)

  def _worst_cases(self):
    told = self._told
    self.right[WORST] = [w.whole.tolist() for w in self._worst.values()]
    for radius, worst in self._worst.items():
      row = told.row(WORST, worst.said, "+".join(told.floats), radius)
      slots = {m: float(np.mean(flag)) for m, flag in worst.right.items()}
      share = float(np.mean(worst.whole))
      yield {**row, "slots": slots, "exact_match": share}


class _Worst:
  """Who is right under all attacks so far, and what is first said wrong."""

  def __init__(self, said, right, whole):
    self.said, self.right, self.whole = said, right, whole

  def take(self, said, right, whole) -> None:
    """One attack more."""
    self.said = np.where((self.whole & ~whole)[:, None], said, self.said)
    self.whole = self.whole & whole
    self.right = {m: self.right[m] & right[m] for m in right}


def _mean(rows: Sequence[dict]) -> dict:
  """One row of several: the mean of every number."""
  first = rows[0]
  numbers = ("exact_match", "distinct_1", "distinct_2", "entropy")
  return {
    **first,
    "slots": {
      m: float(np.mean([row["slots"][m] for row in rows]))
      for m in first["slots"]
    },
    **{name: float(np.mean([row[name] for row in rows])) for name in numbers},
  }


def check(model: Model, captions: Mapping[str, Any] | None) -> None:
  """ValueError for options of a protocol that do not fit the model."""
  if captions and model.captions is not None:
    _target(model, captions.get("target"))


def of_protocol(model, params, state, batch, protocol, tick) -> dict | None:
  """The report of a captioner; None of other models.

  With the pairs of the protocol, its ``captions`` and, in linf without units,
  its radii.
  """
  if model.captions is None:
    return None
  options = {}
  raw = protocol.norm == math.inf and protocol.units is None
  if protocol.radii and raw:
    options["radii"] = protocol.radii
  if not protocol.attacks:
    options["radii"] = ()
  if protocol.max_examples:
    options["max_examples"] = min(protocol.max_examples, MAX_EXAMPLES)
  found = caption_report(
    model,
    params,
    batch,
    state=state,
    valid_range=protocol.valid_range,
    mispair=protocol.mispair,
    **{**options, **(protocol.captions or {})},
  )
  tick("captions")
  return found
