r"""Captions under attack: what is still spelled right.

Of token models accuracy is no single number. The attacks here change inputs
(a, b), the words the model is given (c), or both (d); what is scored is the
words that it then says.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_mm import _compiling
from robust_mm import _validate
from robust_mm import attacks
from robust_mm import modalities
from robust_mm._types import Batch
from robust_mm._types import Model
from robust_mm.attacks import substitutions
from robust_mm.evaluation import batches
from robust_mm.evaluation import caption_scores

MAX_EXAMPLES = 128
RADII = (1 / 255, 2 / 255, 4 / 255, 8 / 255)
CLEAN, TARGETED, TEXT, JOINT = "clean", "targeted", "text", "joint"
EMBEDDING = "embedding (diagnostic)"


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
  max_examples: int = MAX_EXAMPLES,
  mispair: bool = True,
  seed: int = 0,
) -> dict[str, Any]:
  """What a captioner says, clean and under the attacks of token models.

  - ``input``: linf PGD on the sum of token losses of the clean greedy caption,
    which stays fixed, on each modality alone and on all;
  - ``targeted``: towards one fixed sentence, on all modalities at the largest
    radius; success: at least ``threshold`` of its letters in their places;
  - ``text``: the word of the first slot is given as a prompt, and up to
    ``num_substitutions`` of its letters are changed
    (``attacks.substitute``); what the model goes on with is scored;
  - ``joint``: both, the input at the largest radius;
  - ``embedding (diagnostic)``: PGD on the embedded prompt, of the length of one
    substitution in l2; no text says such a thing, so it bounds nothing.

  Every row has the words right by slot, whole captions right, and how diverse
  the captions are: a model that says the same of everything changes little
  under attack.

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
    max_examples: evenly spaced examples.
    mispair: shift every modality but the first by an example, its class with
      it, so that the words of a caption differ.
    seed: of the attacks.

  Returns:
    ``{"num_examples", "target", "threshold", "settings", "rows" [{attack,
    modalities, radius, slots {m: share}, exact_match, distinct_1, distinct_2,
    entropy, success}]}``; ``success`` of the targeted row alone.

  Raises:
    ValueError: a model without captions, or a bad argument.
  """
  if model.captions is None:
    raise ValueError("caption_report needs a model that spells captions.")
  for radius in radii:
    _validate.positive(radii=radius)
  _validate.at_least(1, max_examples=max_examples)
  _validate.in_unit_interval(threshold=threshold)
  words = model.captions.words
  if target is None:
    target = " ".join([words[0]] * len(model.captions.slots))
  wanted = model.captions.ids(target)
  data = batches.host_data(model, batch, max_examples=max_examples)
  if not data.counted.any():
    raise ValueError("batch has no example with a modality present.")
  data = data.take(np.flatnonzero(data.counted))
  told = _Told(model, params, {} if state is None else state, data, mispair)
  common = {"norm": "linf", "budget": 1.0, "valid_range": valid_range}
  pgd = functools.partial(
    attacks.pgd, targets="any", num_steps=num_steps, num_restarts=num_restarts
  )
  key = jax.random.key(seed)
  rows = [told.row(CLEAN, told.clean)]
  moved = told.inputs
  for names in dict.fromkeys([*((m,) for m in told.floats), told.floats]):
    away = told.attack(pgd(**common), towards=None, names=names)
    for radius in radii:
      moved = away(key, radius)
      row = told.row("input", told.greedy(moved), "+".join(names), radius)
      rows.append(row)
  if told.floats and len(radii):
    largest = max(radii)
    moved = told.attack(pgd(**common), towards=None)(key, largest)
    to = told.attack(pgd(**common), towards=wanted)(key, largest)
    said = told.greedy(to)
    own = wanted != model.captions.pad
    share = np.mean((said == wanted[None])[:, own], axis=1)
    row = told.row(TARGETED, said, "+".join(told.floats), largest)
    rows.append({**row, "success": float(np.mean(share >= threshold))})
  if len(model.captions.slots) > 1:
    rows += told.text_rows(num_substitutions, moved, radii, pgd, key)
  return {
    "num_examples": data.size,
    "target": target,
    "threshold": threshold,
    "settings": {
      "num_steps": num_steps,
      "num_restarts": num_restarts,
      "num_substitutions": num_substitutions,
      "mispair": mispair,
      "norm": "linf",
    },
    "rows": rows,
  }


def of_protocol(model, params, state, batch, protocol, tick) -> dict | None:
  """The report of a captioner; None of other models.

  With the pairs of the protocol, the steps of its first attack and, in linf
  without units, its radii.
  """
  if model.captions is None:
    return None
  given = protocol.attacks[0] if protocol.attacks else {}
  options = {
    name: given[name] for name in ("num_steps", "num_restarts") if name in given
  }
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
    **options,
  )
  tick("captions")
  return found


def _compiled(fn):
  """Compiled for a few calls."""
  return jax.jit(fn, compiler_options=_compiling.options_for_once())


class _Told:
  """A captioner on some examples, what it says of them, and what is meant."""

  def __init__(self, model, params, state, data, mispair):
    self._captions, self._model = model.captions, model
    self._params, self._state = params, state
    paired = modalities.stagger(
      {"inputs": data.inputs, "present": data.present, "label": data.label},
      int(mispair),
    )
    self.classes, self._present = paired["classes"], paired["present"]
    self.inputs = paired["inputs"]
    self.floats = tuple(
      m for m, x in self.inputs.items() if jnp.issubdtype(x.dtype, jnp.floating)
    )
    present = self._present

    def embed(params, inputs):
      return model.encode(params, state, inputs, present)[0]

    self._embed = embed
    # Parameters are arguments: constants would be folded for minutes.
    self._generate = _compiled(
      lambda params, inputs: self._captions.generate(
        params, embed(params, inputs), present
      )
    )
    self.clean = self.greedy(self.inputs)

  def greedy(self, inputs) -> np.ndarray:
    """``[n, t]``: what is said of inputs."""
    return np.asarray(self._generate(self._params, inputs))

  def row(self, attack, ids, names="", radius=None, slots=None) -> dict:
    """A row of the report."""
    found = caption_scores.scores(
      self._captions, ids, self.classes, self._present, slots=slots
    )
    return {
      "attack": attack,
      "modalities": names,
      "radius": radius,
      **found,
      "success": None,
    }

  def attack(self, attack, *, towards, names=None):
    """``(key, radius) -> inputs``, away from the clean caption or to one."""
    names = self.floats if names is None else names
    ids = self.clean if towards is None else None
    if towards is not None:
      ids = np.broadcast_to(towards, self.clean.shape)
    sign = -1 if towards is None else 1
    label = jnp.zeros(len(ids), jnp.int32)

    def logits_fn(params, inputs):
      said = self._captions.logits(
        params, self._embed(params, inputs), self._present, ids
      )
      value = sign * self._captions.log_likelihood(said, ids)
      # The margin of the second class over the label is what is raised.
      return jnp.stack([jnp.zeros_like(value), value], axis=1)

    def run(params, key, radius):
      return attack(
        key,
        functools.partial(logits_fn, params),
        self.inputs,
        label,
        present=self._present,
        budget=dict.fromkeys(names, radius),
      )

    return functools.partial(_compiled(run), self._params)

  def text_rows(self, number, moved, radii, pgd, key) -> list[dict]:
    """Rows of the prompt: changed, with changed inputs, and embedded."""
    captions = self._captions
    # The word of the first slot and the space after it.
    space = captions.vocabulary.index(" ")
    ends = np.cumsum(self.clean == space, axis=1)
    first = ends - (self.clean == space) == 0
    has = np.any(self.clean == space, axis=1)
    fixed = first & has[:, None]
    letters = fixed & (self.clean != space)
    allowed = np.arange(len(captions.vocabulary)) > space
    rest = captions.slots[1:]
    table = captions.letters(self._params)
    judged = np.where(fixed, captions.pad, self.clean)

    def loss_fn(params, inputs, embedded):
      said = captions.logits(
        params,
        self._embed(params, inputs),
        self._present,
        self.clean,
        letters=embedded,
      )
      return -captions.log_likelihood(said, judged), said

    @_compiled
    def changed(params, inputs):
      return substitutions.substitute(
        lambda embedded: loss_fn(params, inputs, embedded)[0],
        self.clean,
        captions.letters(params),
        editable=letters,
        allowed=allowed,
        num_substitutions=number,
      )

    @_compiled
    def goes_on(params, inputs, prompt):
      return captions.generate(
        params, self._embed(params, inputs), self._present, prompt, fixed
      )

    everything = "+".join(self.floats)
    largest = max(radii) if len(radii) else None
    rows = []
    for attack, inputs, radius in (
      ("prompt, clean", self.inputs, None),
      (TEXT, self.inputs, None),
      (JOINT, moved, largest),
    ):
      prompt = self.clean
      if attack in (TEXT, JOINT):
        prompt = changed(self._params, inputs)
      said = np.asarray(goes_on(self._params, inputs, prompt))
      names = everything if attack == JOINT else ""
      rows.append(self.row(attack, said, names, radius, rest))
    said = self._embedding_pgd(loss_fn, table, letters, pgd, key)
    said = np.where(fixed, self.clean, said)
    rows.append(self.row(EMBEDDING, said, "", None, rest))
    return rows

  def _embedding_pgd(self, loss_fn, table, letters, pgd, key) -> np.ndarray:
    """What is said, letter by letter of the clean caption, in that ball."""
    embedded = jnp.take(table, self.clean, axis=0)
    apart = jnp.linalg.norm(table[:, None] - table[None], axis=-1)
    pairs = np.triu_indices(len(table), 1)
    radius = float(np.median(np.asarray(apart)[pairs]))
    attack = pgd(norm=2, budget=1.0)

    def mixed(moved):
      return jnp.where(letters[..., None], moved["letters"], embedded)

    def logits_fn(params, moved):
      value, _ = loss_fn(params, self.inputs, mixed(moved))
      return jnp.stack([jnp.zeros_like(value), value], axis=1)

    @_compiled
    def run(params, key):
      label = jnp.zeros(len(self.clean), jnp.int32)
      moved = attack(
        key,
        functools.partial(logits_fn, params),
        {"letters": embedded},
        label,
        budget=radius,
      )
      _, said = loss_fn(params, self.inputs, mixed(moved))
      return jnp.where(
        self.clean == self._captions.pad,
        self._captions.pad,
        jnp.argmax(said, axis=-1),
      )

    return np.asarray(run(self._params, key))
