"""Methods of the study of modality shift that train nothing of their own."""

from collections.abc import Iterable
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

_SMALLEST = 1e-12

Subset = tuple[str, ...]


def log_prior(label: np.ndarray, num_classes: int) -> np.ndarray:
  """Log-frequencies ``[k]`` of the classes in labels ``[n]`` or ``[n, k]``."""
  if label.ndim == 1:
    label = label[:, None] == np.arange(num_classes)
  return np.log(np.maximum(np.mean(label, axis=0), _SMALLEST))


def ensemble(
  single: Mapping[Subset, np.ndarray],
  test_sets: Iterable[Subset],
  prior: np.ndarray,
  *,
  present: Mapping[str, np.ndarray] | None = None,
  multi_label: bool = False,
) -> dict[Subset, np.ndarray]:
  """Late fusion of models of one modality: the mean of log-probabilities.

  Args:
    single: ``{(m,): logits [n, k]}`` of the models, NaN where an item lacks m.
    test_sets: E.
    prior: log-frequencies of the classes, said where an item has something of
      E and nothing of T in it.
    present: ``{m: bool[n]}``, what items have; None for everything.
    multi_label: whether every class is there or not, apart from the others.

  Returns:
    ``{E: [n, k]}``, NaN where an item has nothing of E.
  """
  log = _log_sigmoid if multi_label else _log_softmax
  said = {name: log(x) for (name,), x in single.items()}
  found = {}
  shape = next(iter(said.values())).shape
  for subset in test_sets:
    stacked = np.reshape(
      [x for m, x in said.items() if m in subset], (-1, *shape)
    )
    known = ~np.isnan(stacked).any(axis=-1)
    total = np.where(known[..., None], stacked, 0).sum(axis=0)
    mean = total / np.maximum(known.sum(axis=0), 1)[:, None]
    found[subset] = np.where(known.any(axis=0)[:, None], mean, prior[None])
    if present is not None:
      found[subset][~_some(present, subset)] = np.nan
  return found


def class_means(
  model,
  params,
  state,
  train: dict,
  test: dict,
  labelled: Subset,
  test_sets: Iterable[Subset],
  *,
  batch_size: int,
) -> dict[Subset, np.ndarray]:
  """Cosine of pooled features to the mean of every class.

  Features are centred by the mean of those that were labelled, and examples
  without anything of T are none of them.

  The features are those that the linear head sees, also of a model pretrained
  with contrasts. The space in which contrasts compare has a projection for each
  modality alone; those are no part of the model that a pretraining run keeps
  (``recipes.pretrain``), and say nothing of several modalities together.

  Args:
    model: with ``features``.
    params: its parameters.
    state: its state.
    train: labelled examples, host arrays; of them the modalities ``labelled``.
    test: queries.
    labelled: T.
    test_sets: E.
    batch_size: examples a pass.

  Returns:
    ``{E: [n, k]}``: NaN where an example has nothing of E; -inf, so never
    chosen, for a class without a labelled example.

  Raises:
    ValueError: no example of ``train`` has anything of T.
  """

  @jax.jit
  def pooled(inputs, present):
    embeddings, _ = model.encode(params, state, inputs, present, train=False)
    return model.features(params, embeddings, present)

  def features(batch, subset):
    present = {m: flag & (m in subset) for m, flag in batch["present"].items()}
    parts = []
    for start in range(0, len(batch["label"]), batch_size):
      rows = slice(start, start + batch_size)
      inputs, there = (
        {m: jnp.asarray(x[rows]) for m, x in tree.items()}
        for tree in (batch["inputs"], present)
      )
      parts.append(np.asarray(pooled(inputs, there)))
    return np.concatenate(parts)

  known = _some(train["present"], labelled)
  if not known.any():
    raise ValueError(
      f"train has no example with any of labelled ({', '.join(labelled)})."
    )
  given = features(train, labelled)[known]
  centre = given.mean(axis=0)
  units = _unit(given - centre)
  label = train["label"][known]
  if label.ndim == 1:
    label = label[:, None] == np.arange(model.num_classes)
  means = _unit(label.astype(units.dtype).T @ units)
  found = {}
  for subset in test_sets:
    cosine = _unit(features(test, subset) - centre) @ means.T
    cosine = np.where(label.any(axis=0)[None], cosine, -np.inf)
    cosine[~_some(test["present"], subset)] = np.nan
    found[subset] = cosine.astype("f4")
  return found


def _some(present: Mapping[str, np.ndarray], subset: Subset) -> np.ndarray:
  """Which examples have any modality of a set, ``bool[n]``."""
  return np.any([present[name] for name in subset], axis=0)


def _unit(x: np.ndarray) -> np.ndarray:
  return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), _SMALLEST)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
  shifted = logits - logits.max(axis=-1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _log_sigmoid(logits: np.ndarray) -> np.ndarray:
  return -np.logaddexp(0, -logits)
