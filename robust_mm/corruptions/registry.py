"""Kinds by form of modality, and the whole suite at once."""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from robust_mm import _validate
from robust_mm import modalities as modalities_lib
from robust_mm._types import Batch
from robust_mm.corruptions import base
from robust_mm.corruptions import factories
from robust_mm.corruptions import forms as forms_lib
from robust_mm.corruptions import kinds as kinds_lib

SEVERITIES = (1, 2, 3, 4, 5)
PLACES = ("each", "all")


def kinds(form: str | None = None) -> tuple[str, ...]:
  """The names of all kinds, or of those that make sense for a form.

  >>> kinds("token")
  ('absent', 'shift', 'stuck', 'swap', 'token_drop', 'zeros')

  Raises:
    ValueError: an unknown form.
  """
  if form is None:
    return tuple(sorted(kinds_lib.KINDS))
  _validate.one_of(forms_lib.FORMS, form=form)
  return tuple(n for n in kinds() if form in kinds_lib.KINDS[n].forms)


def strengths(kind: str) -> tuple[float, ...]:
  """The strengths of a kind at severity 1 to 5."""
  _validate.one_of(kinds(), kind=kind)
  return kinds_lib.KINDS[kind].strengths


def deviations(batch: Batch) -> dict[str, Any]:
  """The standard deviation of every channel of every modality.

  Measured where the modality is present, over examples and over all axes but
  the last: the ``scale`` of :func:`additive`. Tuples of numbers.

  Args:
    batch: of training data, ``inputs`` and ``present``.
  """
  found = {}
  for name, value in batch["inputs"].items():
    rows = np.asarray(batch["present"][name])
    value = np.asarray(value)[rows].astype(np.float64)
    axes = tuple(range(value.ndim - 1))
    size = np.std(value, axis=axes) if rows.any() else np.zeros(value.shape[-1])
    found[name] = forms_lib.freeze(size)
  return found


def suite(
  shapes: Mapping[str, Any],
  *,
  severities: Sequence[int] = SEVERITIES,
  kinds: Iterable[str] | None = None,
  modalities: str = "each",
  correlated: bool = False,
  share: float = 1.0,
  scale: Any = 1.0,
  forms: Mapping[str, str] | None = None,
  unknown: int = 0,
) -> dict[str, base.Corruption]:
  """Every kind on every modality it makes sense for, at every severity.

  >>> shapes = {"image": (28, 28, 1), "audio": (64, 40)}
  >>> list(suite(shapes, severities=(1, 5), kinds=["shift"]))
  ['shift/audio/1', 'shift/audio/5']

  Args:
    shapes: ``{m: shape of one input}``, or what has ``shape`` and ``dtype`` of
      one input where it is not float32.
    severities: of 1 to 5.
    kinds: names; by default all.
    modalities: ``"each"`` alone, or ``"all"`` that the kind makes sense for at
      once (channels of images only where there are several).
    correlated: with ``"all"``, whether they share their decisions.
    share: of examples that are touched.
    scale: of :func:`additive`.
    forms: ``{m: form}`` where a shape does not tell.
    unknown: the unknown token.

  Returns:
    ``{"kind/modality or all/severity": corruption}``.

  Raises:
    ValueError: naming the argument that is wrong.
  """
  _validate.one_of(PLACES, modalities=modalities)
  _validate.known(shapes, forms=forms or {})
  every = tuple(sorted(kinds_lib.KINDS))
  for kind in (kinds := every if kinds is None else tuple(kinds)):
    _validate.one_of(every, kinds=kind)
  own = {"additive": {"scale": scale}, "token_drop": {"unknown": unknown}}
  found = {}
  for kind in kinds:
    fitting = _fitting(kind, shapes, forms or {})
    groups = {"all": fitting} if modalities == "all" else {}
    if modalities == "each":
      groups = {name: (name,) for name in fitting}
    for place, names in groups.items():
      for severity in severities if names else ():
        found[f"{kind}/{place}/{severity}"] = getattr(factories, kind)(
          severity=severity,
          modalities=names,
          correlated=correlated,
          share=share,
          forms=forms,
          **own.get(kind, {}),
        )
  return found


def _fitting(kind, shapes, forms) -> tuple[str, ...]:
  names = []
  for name in modalities_lib.names(shapes):
    shape = tuple(getattr(shapes[name], "shape", shapes[name]))
    dtype = getattr(shapes[name], "dtype", jnp.float32)
    form = forms.get(name) or forms_lib.form(shape, dtype)
    if kinds_lib.fits(kind, form, shape):
      names.append(name)
  return tuple(names)
