"""The token transformer from input shapes alone."""

from collections.abc import Mapping
from collections.abc import Sequence

import jax

from robust_mm import _validate
from robust_mm._types import Model
from robust_mm._types import Target
from robust_mm.models import encoders as encoders_lib
from robust_mm.models import multimodal
from robust_mm.models import transformer
from robust_mm.models.normalization import Normalization


def token_transformer(
  input_shapes: Mapping[str, Sequence[int]],
  num_classes: int,
  *,
  width: int = 128,
  patch: Mapping[str, Sequence[int]] | None = None,
  vocabulary_sizes: Mapping[str, int] | None = None,
  normalization: Mapping[str, Normalization] | None = None,
  target: Target | None = None,
  **fusion_options,
) -> Model:
  """A transformer over patches, frames, vectors and ids; absent ones masked.

  >>> model = token_transformer({"image": (28, 28, 1), "sensor": (6,)}, 10)
  >>> model.token_parts.num_tokens
  {'image': 16, 'sensor': 1}

  Args:
    input_shapes: ``{m: shape}`` of one input.
    num_classes: k; 1 with a target.
    width: d of all tokens.
    patch: ``{m: entries}`` a token covers, see ``encoders.patches``.
    vocabulary_sizes: ``{m: size}`` of those whose inputs are integer ids.
    normalization: ``{m: Normalization}``; none where a modality is left out.
    target: of a regression, see :func:`multimodal.from_parts`.
    **fusion_options: of :class:`transformer.TransformerFusion`.

  Raises:
    ValueError: naming the argument that is wrong.
  """
  patch, sizes = dict(patch or {}), dict(vocabulary_sizes or {})
  _validate.known(input_shapes, patch=patch, vocabulary_sizes=sizes)
  encoders = {
    name: encoders_lib.patches(
      embedding_dim=width,
      patch=patch.get(name),
      vocabulary_size=sizes.get(name),
    )
    for name in input_shapes
  }
  head = transformer.TransformerFusion(num_classes, **fusion_options)
  model = multimodal.from_parts(
    encoders,
    head,
    input_shapes=input_shapes,
    normalization=normalization,
    target=target,
  )
  # Sizes that do not fit are refused here, by name.
  jax.eval_shape(model.init, jax.random.key(0))
  return model
