"""Multimodal models from encoders and a fusion head.

>>> from robust_mm.models import encoders
>>> model = late_fusion(
...   {"left": encoders.lipschitz_mlp(), "right": encoders.lipschitz_mlp()},
...   num_classes=10,
...   input_shapes={"left": (8, 4), "right": (8, 4)},
... )
>>> params, state = model.init(jax.random.key(0))
>>> sorted(params)
['encoders', 'fusion']
"""

import inspect
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from robust_mm import _validate
from robust_mm import modalities
from robust_mm._types import Model
from robust_mm._types import Target
from robust_mm.models import captioning
from robust_mm.models import encoders as encoders_lib
from robust_mm.models import functional
from robust_mm.models import fusion as fusion_lib
from robust_mm.models import geometries
from robust_mm.models import masked
from robust_mm.models import regression
from robust_mm.models import sequences
from robust_mm.models import splits
from robust_mm.models import transformer
from robust_mm.models import trunk
from robust_mm.models.functional import Encoder
from robust_mm.models.normalization import Normalization


def late_fusion(
  encoders: Mapping[str, Encoder],
  num_classes: int,
  *,
  input_shapes: Mapping[str, Sequence[int]],
  normalization: Mapping[str, Normalization] | None = None,
  **fusion_options,
) -> Model:
  """Encoders and the orthonormal head of CRMT, ready for ``certify``.

  Args:
    encoders: ``{m: Encoder}``.
    num_classes: k, at most every ``embedding_dim``.
    input_shapes: ``{m: shape}`` of one input.
    normalization: ``{m: Normalization}``; none where a modality is left out.
    **fusion_options: of :class:`fusion.OrthogonalFusion`.
  """
  head = fusion_lib.OrthogonalFusion(num_classes, **fusion_options)
  return from_parts(
    encoders, head, input_shapes=input_shapes, normalization=normalization
  )


def concat_fusion(
  encoders: Mapping[str, Encoder],
  num_classes: int,
  *,
  input_shapes: Mapping[str, Sequence[int]],
  normalization: Mapping[str, Normalization] | None = None,
  **fusion_options,
) -> Model:
  """Encoders and one dense layer: the plain joint model.

  ``fusion_options`` are those of :class:`fusion.ConcatFusion`.
  """
  head = fusion_lib.ConcatFusion(num_classes, **fusion_options)
  return from_parts(
    encoders, head, input_shapes=input_shapes, normalization=normalization
  )


def token_fusion(
  encoders: Mapping[str, Encoder],
  num_classes: int,
  *,
  input_shapes: Mapping[str, Sequence[int]],
  normalization: Mapping[str, Normalization] | None = None,
  **fusion_options,
) -> Model:
  """Encoders and a transformer over modality tokens; no certificate.

  ``fusion_options`` are those of :class:`fusion.TokenFusion`.
  """
  head = fusion_lib.TokenFusion(num_classes, **fusion_options)
  return from_parts(
    encoders, head, input_shapes=input_shapes, normalization=normalization
  )


def trunk_fusion(
  encoders: Mapping[str, Encoder],
  num_classes: int,
  *,
  input_shapes: Mapping[str, Sequence[int]],
  normalization: Mapping[str, Normalization] | None = None,
  **fusion_options,
) -> Model:
  """Encoders and a 1-Lipschitz perceptron over all embeddings.

  Modalities interact and ``certify`` still holds: for the largest joint radius.
  ``fusion_options`` are those of :class:`trunk.TrunkFusion`.
  """
  head = trunk.TrunkFusion(num_classes, **fusion_options)
  return from_parts(
    encoders, head, input_shapes=input_shapes, normalization=normalization
  )


def masked_fusion(
  encoders: Mapping[str, Encoder],
  num_classes: int,
  *,
  input_shapes: Mapping[str, Sequence[int]],
  normalization: Mapping[str, Normalization] | None = None,
  **fusion_options,
) -> Model:
  """Encoders and a perceptron with learnt vectors for absent modalities.

  ``fusion_options`` are those of :class:`masked.MaskedFusion`.
  """
  head = masked.MaskedFusion(num_classes, **fusion_options)
  return from_parts(
    encoders, head, input_shapes=input_shapes, normalization=normalization
  )


def captioner(
  encoders: Mapping[str, Encoder],
  num_classes: int,
  *,
  input_shapes: Mapping[str, Sequence[int]],
  normalization: Mapping[str, Normalization] | None = None,
  **fusion_options,
) -> Model:
  """Encoders and a causal transformer that spells what each modality shows.

  ``fusion_options`` are those of :class:`captioning.CaptionFusion`.
  """
  head = captioning.CaptionFusion(num_classes, **fusion_options)
  return from_parts(
    encoders, head, input_shapes=input_shapes, normalization=normalization
  )


FUSIONS = {
  "captioner": captioning.CaptionFusion,
  "concat": fusion_lib.ConcatFusion,
  "masked": masked.MaskedFusion,
  "orthogonal": fusion_lib.OrthogonalFusion,
  "token": fusion_lib.TokenFusion,
  "transformer": transformer.TransformerFusion,
  "trunk": trunk.TrunkFusion,
}


def build(
  *,
  fusion: str,
  encoders: Mapping[str, Mapping[str, Any]],
  num_classes: int,
  input_shapes: Mapping[str, Sequence[int]],
  normalization: Mapping[str, Normalization] | None = None,
  fusion_options: Mapping[str, Any] | None = None,
  target: Target | None = None,
) -> Model:
  """The model a configuration describes.

  Args:
    fusion: "orthogonal", "concat", "masked", "token", "transformer", "trunk"
      or "captioner".
    encoders: ``{m: {"name": factory, **options}}``, see ``encoders.make``;
      ``embedding_radius`` is an option of all of them.
    num_classes: k; 1 with a target.
    input_shapes: ``{m: shape}`` of one input.
    normalization: ``{m: Normalization}``.
    fusion_options: keyword arguments of the fusion.
    target: of a regression, see :func:`from_parts`.

  Raises:
    UserError: for an unknown fusion, encoder or option, with the nearest known
      one, and for values they refuse.
  """
  if fusion not in FUSIONS:
    raise _validate.UserError(
      f"fusion must be one of {', '.join(FUSIONS)}; got {fusion!r}."
      f"{_validate.suggestion(fusion, FUSIONS)}"
    )
  options = dict(fusion_options or {})
  known = tuple(inspect.signature(FUSIONS[fusion]).parameters)[1:]
  for option in options:
    if option not in known:
      raise _validate.UserError(
        f"fusion {fusion!r} has no option {option!r}; it has "
        f"{', '.join(known) or 'none'}."
        f"{_validate.suggestion(option, known)}"
      )
  try:
    made = {name: _make(name, value) for name, value in encoders.items()}
    head = FUSIONS[fusion](num_classes, **options)
    model = from_parts(
      made,
      head,
      input_shapes=input_shapes,
      normalization=normalization,
      target=target,
    )
    # Sizes that do not fit (classes against embeddings, images against
    # vectors) show here rather than after the data has been read.
    jax.eval_shape(model.init, jax.random.key(0))
  except _validate.UserError:
    raise
  except ValueError as error:
    raise _validate.UserError(str(error)) from error
  return model


def _make(modality: str, options: Mapping[str, Any]) -> Encoder:
  options = dict(options)
  if "name" not in options:
    raise _validate.UserError(
      f"the encoder of modality {modality!r} has no 'name'; known are "
      f"{', '.join(encoders_lib.FACTORIES)}."
    )
  return encoders_lib.make(options.pop("name"), **options)


def from_parts(
  encoders: Mapping[str, Encoder],
  fusion: Any,
  *,
  input_shapes: Mapping[str, Sequence[int]],
  normalization: Mapping[str, Normalization] | None = None,
  target: Target | None = None,
) -> Model:
  """A model from encoders and a fusion value.

  Parameters are under ``encoders/<m>/...`` and ``fusion/...``, the state under
  ``encoders/<m>/...``. Absent inputs are masked before the encoder and absent
  embeddings after it, so neither a value nor a gradient passes.

  With a ``target`` it is a regression: ``logits`` [b, 1] are ``mean + deviation
  * output`` of a fusion with ``num_classes=1``, the label in its own units.
  """
  fusion = regression.of_task(fusion, target)
  names = modalities.names(encoders)
  if not names:
    raise ValueError("encoders must name at least one modality.")
  _check_encoders(encoders)
  sequences.check(encoders, fusion)
  _validate.known(names, input_shapes=input_shapes)
  normalization = dict(normalization or {})
  _validate.known(names, normalization=normalization)
  for name in names:
    if name not in input_shapes:
      raise ValueError(f"input_shapes has no entry for modality {name!r}.")
  shapes = {name: tuple(input_shapes[name]) for name in names}
  parts = {
    name: functional.encoder_functions(encoders[name], shapes[name])
    for name in names
  }
  normalizers = {
    name: Normalization()
    if encoders[name].tokens or encoders[name].normalizes
    else normalization.get(name, Normalization())
    for name in names
  }
  dims = {name: encoders[name].embedding_dim for name in names}
  return Model(
    modalities=names,
    num_classes=fusion.num_classes,
    init=_init(parts, fusion, dims),
    encode=_encode(parts, normalizers, encoders),
    fuse=lambda params, embeddings, present: fusion(
      params["fusion"], embeddings, present
    ),
    geometry=geometries.make(parts, fusion, encoders, normalizers, shapes),
    input_shapes=shapes,
    tokens=tuple(name for name in names if encoders[name].tokens),
    freeze=_freeze(parts, fusion, encoders, normalizers, shapes),
    project=_project(parts),
    target=target,
    **sequences.functions(fusion, encoders, normalizers, shapes),
    **splits.functions(encoders, normalizers),
  )


def _check_encoders(encoders) -> None:
  for name, encoder in encoders.items():
    if isinstance(encoder, Encoder):
      continue
    hint = "models.custom makes one of an nnx module's class or factory"
    if getattr(encoder, "__name__", None) in encoders_lib.FACTORIES:
      hint = f"call it, as in encoders.{encoder.__name__}()"
    raise ValueError(
      f"encoders[{name!r}] must be an Encoder, got {_validate.kind(encoder)}: "
      f"{hint}."
    )


def _project(parts) -> Callable | None:
  if all(part.project is None for part in parts.values()):
    return None

  def project(params):
    made = {
      name: params["encoders"][name]
      if part.project is None
      else part.project(params["encoders"][name])
      for name, part in parts.items()
    }
    return {**params, "encoders": made}

  return project


def _freeze(parts, fusion, encoders, normalizers, shapes) -> Callable:
  def freeze(params):
    made = {
      name: part.freeze(params["encoders"][name])
      for name, part in parts.items()
    }
    fixed = {name: part for name, (part, _) in made.items()}
    head, head_params = fusion_lib.freeze(fusion, params["fusion"])
    values = {
      "encoders": {name: encoded for name, (_, encoded) in made.items()},
      "fusion": head_params,
    }
    model = Model(
      modalities=tuple(parts),
      num_classes=fusion.num_classes,
      init=lambda key: (values, {}),
      encode=_encode(fixed, normalizers, encoders),
      fuse=lambda params, embeddings, present: head(
        params["fusion"], embeddings, present
      ),
      geometry=None,
      input_shapes=shapes,
      tokens=tuple(name for name in parts if encoders[name].tokens),
      target=getattr(fusion, "target", None),
      **sequences.functions(fusion, encoders, normalizers, shapes),
    )
    return model, values

  return freeze


def _init(parts, fusion, dims) -> Callable:
  def init(key):
    # Checked, and drawn, before the encoders: a head that does not fit is
    # refused at once.
    head = fusion.init(jax.random.fold_in(key, 0), dims)
    made = {
      name: part.init(jax.random.fold_in(key, index + 1))
      for index, (name, part) in enumerate(parts.items())
    }
    params = {name: params for name, (params, _) in made.items()}
    states = {name: state for name, (_, state) in made.items()}
    return {"encoders": params, "fusion": head}, _stateful(parts, states)

  return init


def _encode(parts, normalizers, encoders) -> Callable:
  def encode(params, state, inputs, present, *, train=False, key=None):
    for argument, given in (("inputs", inputs), ("present", present)):
      for name in parts:
        if name not in given:
          raise ValueError(f"{argument} has no modality {name!r}.")
    inputs = modalities.mask(
      {name: inputs[name] for name in parts},
      {name: present[name] for name in parts},
    )
    embeddings, states = {}, {}
    held = (state or {}).get("encoders", {})
    for index, (name, part) in enumerate(parts.items()):
      x = normalizers[name](inputs[name])
      if not encoders[name].tokens and not jnp.issubdtype(
        x.dtype, jnp.floating
      ):
        x = x.astype(jnp.float32)
      embeddings[name], states[name] = part.apply(
        params["encoders"][name],
        _state_of(part, held, name),
        x,
        train=train,
        key=None if key is None else jax.random.fold_in(key, index),
      )
    embeddings = modalities.mask(
      embeddings, {name: present[name] for name in parts}
    )
    return embeddings, _stateful(parts, states)

  return encode


def _stateful(parts, states) -> dict:
  """The state of those encoders that have any: mostly an empty dict."""
  kept = {name: s for name, s in states.items() if parts[name].stateful}
  return {"encoders": kept} if kept else {}


def _state_of(part, held, name: str):
  if not part.stateful:
    return {}
  if name not in held:
    raise ValueError(
      f"state has no entry for the encoder of modality {name!r}, which keeps "
      f"statistics; pass the state that init or training gave (state=...)."
    )
  return held[name]
