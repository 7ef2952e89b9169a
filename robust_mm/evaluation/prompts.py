"""Attacks on the words a captioner is given: text, joint, and embedded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from robust_mm.attacks import substitutions
from robust_mm.evaluation import told as told_lib

PROMPT, TEXT, JOINT = "prompt, clean", "text", "joint"
EMBEDDING = "embedding (diagnostic)"


class Prompts:
  """The word of the first slot as a prompt, and the space after it.

  Args:
    told: the captioner and its examples.
    number: letters that may be changed.
  """

  def __init__(self, told: told_lib.Told, number: int):
    self._told, self._number = told, number
    captions, clean = told.captions, told.clean
    space = captions.vocabulary.index(" ")
    ends = np.cumsum(clean == space, axis=1)
    first = ends - (clean == space) == 0
    self.fixed = first & np.any(clean == space, axis=1)[:, None]
    self.letters = self.fixed & (clean != space)
    self._allowed = np.arange(len(captions.vocabulary)) > space
    self.judged = np.where(self.fixed, captions.pad, clean)
    self._slots = captions.slots[1:]
    self._change = told_lib.compiled(self._changed)
    self._value = told_lib.compiled(
      lambda params, inputs, ids: told.loss(params, inputs, ids, self.judged)[0]
    )
    self._go_on = told_lib.compiled(
      lambda params, inputs, prompt: told.goes_on(
        params, inputs, prompt, self.fixed
      )
    )

  def rows(self, pgd, common, key, largest) -> list[dict]:
    """Rows of the report.

    Args:
      pgd: the factory of attacks.
      common: its arguments of attacks on inputs.
      key: a JAX key.
      largest: the radius of inputs; None where these do not change.
    """
    told = self._told
    changed = self._change(told.params, told.inputs)
    rows = [
      self._row(PROMPT, told.inputs, told.clean),
      self._row(TEXT, told.inputs, changed),
    ]
    if largest is not None:
      attack = told.attack(pgd(**common), ids=changed, judged=self.judged)
      moved = attack(key, largest)
      # Letters that were best for clean inputs, or better ones for these.
      again = self._change(told.params, moved)
      values = [self._value(told.params, moved, x) for x in (changed, again)]
      best = jnp.where((values[1] > values[0])[:, None], again, changed)
      names = "+".join(told.floats)
      rows.append(self._row(JOINT, moved, best, names, largest))
    return [*rows, self._embedded(pgd, key)]

  def _row(self, attack, inputs, prompt, names="", radius=None):
    said = np.asarray(self._go_on(self._told.params, inputs, prompt))
    return self._told.row(attack, said, names, radius, self._slots)

  def _changed(self, params, inputs):
    told = self._told
    return substitutions.substitute(
      lambda letters: told.loss(
        params, inputs, told.clean, self.judged, letters
      )[0],
      told.clean,
      told.captions.letters(params),
      editable=self.letters,
      allowed=self._allowed,
      num_substitutions=self._number,
    )

  def _embedded(self, pgd, key) -> dict:
    """What is said, letter by letter of the clean caption, in that ball."""
    told, captions = self._told, self._told.captions
    table = captions.letters(told.params)
    embedded = jnp.take(table, told.clean, axis=0)
    apart = jnp.linalg.norm(table[:, None] - table[None], axis=-1)
    pairs = np.triu_indices(len(table), 1)
    radius = float(np.median(np.asarray(apart)[pairs]))
    attack = pgd(norm=2, budget=1.0)

    def judge(params, moved):
      letters = jnp.where(self.letters[..., None], moved["letters"], embedded)
      return told.loss(params, told.inputs, told.clean, self.judged, letters)

    def logits_fn(params, moved):
      return told.raised(*judge(params, moved), self.judged)

    @jax.jit
    def run(params, key):
      moved = attack(
        key,
        functools.partial(logits_fn, params),
        {"letters": embedded},
        jnp.zeros(len(told.clean), jnp.int32),
        budget=radius,
      )
      _, said = judge(params, moved)
      chosen = jnp.argmax(said, axis=-1)
      return jnp.where(told.clean == captions.pad, captions.pad, chosen)

    said = np.asarray(run(told.params, key))
    said = np.where(self.fixed, told.clean, said)
    return told.row(EMBEDDING, said, "", None, self._slots)
