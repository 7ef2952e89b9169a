"""Several operations on several modalities, as one intervention."""

import zlib
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from robust_mm import _validate
from robust_mm.augmentations import base
from robust_mm.augmentations import options as options_lib

PATH = "settings"


def make(
  settings: Mapping[str, Any], *, path: str = PATH
) -> Callable[..., Any]:
  """``fn(key, params, state, batch) -> batch``, as in recipes.

  Operations are applied in the order of :mod:`robust_mm.augmentations`; each
  draws by itself, in every modality, by their names.

  Args:
    settings: ``{modality: {operation: {option: value}}}`` with the names of the
      factories and of their arguments.
    path: the key that sentences begin with, such as ``config.augmentation``.

  Raises:
    ValueError: naming the key, such as ``settings.inertial.rotate.angle``; what
      does not fit the inputs is refused when they are seen.
  """
  plan = _plan(settings, path)

  def intervene(key, params, state, batch):
    del params, state
    inputs = {n: jnp.asarray(x) for n, x in batch["inputs"].items()}
    one = {
      n: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for n, x in inputs.items()
    }
    _check(plan, one, path)
    for name, chosen in plan.items():
      own = jax.random.fold_in(key, zlib.crc32(name.encode()))
      for augmentation in chosen:
        drawn = jax.random.fold_in(own, zlib.crc32(augmentation.kind.encode()))
        inputs[name] = augmentation(drawn, inputs[name], batch["present"][name])
    return {**batch, "inputs": inputs}

  return intervene


def check(
  settings: Mapping[str, Any],
  inputs: Mapping[str, Any],
  *,
  path: str = PATH,
) -> None:
  """Refuses settings that do not fit the inputs.

  Args:
    settings: as for :func:`make`.
    inputs: ``{m: what has the shape and the dtype of one input}``.
    path: the key that sentences begin with.

  Raises:
    ValueError: naming the key.
  """
  _check(_plan(settings, path), inputs, path)


def _plan(settings, path) -> dict[str, tuple[base.Augmentation, ...]]:
  return {
    name: tuple(
      base.make(kind, f"{path}.{name}.{kind}", **given)
      for kind, given in chosen.items()
    )
    for name, chosen in options_lib.check(settings, path).items()
  }


def _check(plan, inputs, path) -> None:
  _validate.known(sorted(inputs), **{path: plan})
  for name, chosen in plan.items():
    shape, dtype = tuple(inputs[name].shape), inputs[name].dtype
    for augmentation in chosen:
      augmentation.check(
        shape, dtype, path=f"{path}.{name}.{augmentation.kind}", name=name
      )
