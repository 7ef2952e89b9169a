"""What tests of penalties share: logits, wrong ones, every penalty."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from robust_mm import _compiling
from robust_mm import losses

N, C = 6, 7
# Compiled once each, and used once.
jit = functools.partial(jax.jit, compiler_options=_compiling.options_for_once())


def sample(seed=0, items=N, classes=C, scale=2.0):
  rng = np.random.default_rng(seed)
  logits = scale * rng.normal(size=(items, classes))
  return logits, rng.integers(0, classes, items)


def wrong_of(logits, label):
  """[n, C - 1] wrong logits, and where they were."""
  mask = np.arange(logits.shape[1])[None] != np.asarray(label)[:, None]
  return logits[mask].reshape(len(logits), -1), mask


def value(penalty, logits, label, weights=None):
  found = jit(lambda z: penalty(z, label, weights))(jnp.asarray(logits))
  return float(found)


def levels_of(logits, label, window, log_prob):
  if log_prob:
    logits = scipy.special.log_softmax(logits, axis=1)
  wrong, _ = wrong_of(logits, label)
  return -np.sort(-wrong, axis=1)[:, window[0] : window[1]].mean(axis=1)


def every_penalty():
  return {
    "wrong_class_dispersion": {},
    "complement_kl": {},
    "sorted_slice_dispersion": {"top_n": 4, "kind": "drsl2"},
    "topk_level": {"window": (0, 3)},
    "topk_dispersion": {"window": (0, 3)},
    "topk_margin": {"window": (0, 3)},
    "label_smoothing": {},
    "confidence_penalty": {},
    "logit_norm": {},
  }


def loss_of(name, weight):
  """The loss with that one of every penalty; published where it must be."""
  penalty = losses.penalty(name, **every_penalty()[name])
  fidelity = "published" if penalty.fidelity_only else None
  return losses.restrained_softmax(penalty, weight, fidelity=fidelity)


def leaving_out(name, counted):
  """How that loss is told which items count: padding counts as published."""
  said = "valid" if name != "sorted_slice_dispersion" else "valid_weights"
  return {said: counted if said == "valid" else np.asarray(counted, float)}
