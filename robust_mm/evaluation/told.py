"""A captioner on some examples: what it says, and what makes it say else."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from robust_mm import _compiling
from robust_mm import modalities
from robust_mm.evaluation import caption_scores
from robust_mm.evaluation import probes
from robust_mm.evaluation import slopes

# Beyond every log-likelihood of a caption.
_FAR = 1e3


def compiled(fn):
  """Compiled for a few calls."""
  return jax.jit(fn, compiler_options=_compiling.options_for_once())


class Told:
  """What a captioner says of some examples, and what is meant.

  Args:
    model: with ``captions``.
    params: its parameters.
    state: its state.
    data: the examples.
    mispair: as ``caption_report`` takes it.
  """

  def __init__(self, model, params, state, data, mispair):
    self.captions, self.params = model.captions, params
    paired = modalities.stagger(
      {"inputs": data.inputs, "present": data.present, "label": data.label},
      int(mispair),
    )
    self.classes, self.present = paired["classes"], paired["present"]
    self.inputs = paired["inputs"]
    self.floats = tuple(m for m, x in self.inputs.items() if slopes.is_float(x))
    self._embed = lambda params, inputs: model.encode(
      params, state, inputs, self.present
    )[0]
    # Parameters are arguments: constants would be folded for minutes.
    self._generate = jax.jit(self.goes_on)
    self.clean = self.greedy(self.inputs)

  def greedy(self, inputs) -> np.ndarray:
    """``[n, t]``: what is said of inputs."""
    return np.asarray(self._generate(self.params, inputs))

  def goes_on(self, params, inputs, prompt=None, fixed=None):
    """The same with given letters where ``fixed`` says so; to be compiled."""
    embedded = self._embed(params, inputs)
    return self.captions.generate(params, embedded, self.present, prompt, fixed)

  def right(self, ids, slots=None):
    """``({slot: bool[n]}, bool[n])``, as ``caption_scores.right`` has it."""
    return caption_scores.right(
      self.captions, ids, self.classes, self.present, slots=slots
    )

  def row(self, attack, ids, names="", radius=None, slots=None) -> dict:
    """A row of the report."""
    found = caption_scores.scores(
      self.captions, ids, self.classes, self.present, slots=slots
    )
    return {
      "attack": attack,
      "modalities": names,
      "radius": radius,
      **found,
      "success": None,
    }

  def loss(self, params, inputs, ids, judged, letters=None):
    """``(loss [n], said [n, t, V])``: minus log p of ``judged`` after ``ids``.

    ``letters`` are embedded ones in their place; padding is not judged.
    """
    said = self.captions.logits(
      params, self._embed(params, inputs), self.present, ids, letters=letters
    )
    return -self.captions.log_likelihood(said, judged), said

  def raised(self, value, said, judged, *, away=True):
    """``[n, 2]`` logits: the second wins where a letter, or none, differs.

    So that of several points an attack keeps one at which something else is
    said, or the very sentence, and of such ones that of the largest value.
    """
    pad = self.captions.pad
    # As in decoding, padding is no letter that could be said.
    chosen = jnp.argmax(said.at[..., pad].set(-jnp.inf), axis=-1)
    differs = jnp.any((chosen != judged) & (judged != pad), axis=-1)
    if away:
      value = jnp.where(differs, value, value - _FAR)
    else:
      value = jnp.where(differs, -value, _FAR - value)
    return jnp.stack([jnp.zeros_like(value), value], axis=1)

  def attack(self, attack, *, towards=None, names=None, ids=None, judged=None):
    """``(key, radius) -> inputs``, away from what is said or to a sentence.

    Args:
      attack: of ``robust_mm.attacks``.
      towards: ``[t]``, a sentence; None for away.
      names: the modalities that may change; all by default.
      ids: ``[n, t]``, letters that are given; the clean caption by default.
      judged: ``[n, t]``, the letters that count; all of them by default.
    """
    names = self.floats if names is None else names
    ids = self.clean if ids is None else ids
    if towards is not None:
      ids = np.broadcast_to(towards, self.clean.shape)
    judged = ids if judged is None else judged
    label = jnp.zeros(len(ids), jnp.int32)

    def logits_fn(params, inputs):
      value, said = self.loss(params, inputs, ids, judged)
      return self.raised(value, said, judged, away=towards is None)

    def run(params, key, radius):
      return attack(
        key,
        functools.partial(logits_fn, params),
        self.inputs,
        label,
        present=self.present,
        budget=dict.fromkeys(names, radius),
      )

    # Hundreds of gradients a call: worth optimising.
    return functools.partial(jax.jit(run), self.params)

  def noise(self, rng: np.random.Generator, radius, valid_range) -> dict:
    """Inputs with every entry moved by the radius, up or down by chance."""
    moved = dict(self.inputs)
    for m in self.floats:
      x = np.asarray(self.inputs[m])
      pair = valid_range
      if isinstance(pair, Mapping):
        pair = pair.get(m)
      here = probes.like(np.asarray(self.present[m]), x)
      signs = np.where(rng.random(x.shape) < 0.5, -1.0, 1.0) * here
      moved[m] = probes.cut(x + radius * signs, x, pair)
    return moved
