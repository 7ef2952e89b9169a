"""Encoders as values, by factory or by name.

A factory returns an :class:`Encoder`: a description that is built once the
input shape is known. ``mlp``, ``cnn`` and ``temporal_cnn`` state the product of
their layers' norms as a Lipschitz constant, which says little unless training
kept it small; of ``transformer``, ``resnet18``, ``temporal_resnet``,
``video_resnet`` and ``vit`` none is known; the ``lipschitz_*`` ones state 1.
``patches`` gives a sequence of tokens, for ``fusion="transformer"`` alone.

>>> make("mlp", hidden_sizes=(32,), embedding_dim=16).embedding_dim
16
"""

import dataclasses
import inspect
import numbers
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from robust_mm import _validate
from robust_mm.models import functional
from robust_mm.models import lipschitz
from robust_mm.models import networks
from robust_mm.models import patches as patches_lib
from robust_mm.models import residual
from robust_mm.models import token_encoders
from robust_mm.models import vit_encoders
from robust_mm.models.functional import Encoder

lipschitz_mlp = lipschitz.lipschitz_mlp
lipschitz_cnn = lipschitz.lipschitz_cnn
lipschitz_temporal_cnn = lipschitz.lipschitz_temporal_cnn
patches = patches_lib.patches
vit = vit_encoders.vit
from_vit = vit_encoders.encoder
vit_tokens = token_encoders.vit_tokens


def make(name: str, **options) -> Encoder:
  """The encoder of a configuration: ``make("mlp", embedding_dim=32)``.

  Besides the options of the factory, ``embedding_radius=B`` makes it
  ``bounded``.

  Raises:
    UserError: for an unknown name or option, with the nearest known one.
  """
  if name not in FACTORIES:
    raise _validate.UserError(
      f"encoder name must be one of {', '.join(FACTORIES)}; got {name!r}."
      f"{_validate.suggestion(name, FACTORIES)}"
    )
  factory = FACTORIES[name]
  known = (*inspect.signature(factory).parameters, _RADIUS)
  for option in options:
    if option not in known:
      raise _validate.UserError(
        f"encoder {name} has no option {option!r}; it has "
        f"{', '.join(known)}.{_validate.suggestion(option, known)}"
      )
  radius = options.pop(_RADIUS, None)
  encoder = factory(**options)
  return encoder if radius is None else bounded(encoder, radius=radius)


def bounded(encoder: Encoder, *, radius: float) -> Encoder:
  r"""The encoder followed by projection on a ball.

  .. math:: \phi'(x) = \phi(x) \min(1, B / \|\phi(x)\|)

  Formal guarantees:
    - Its Lipschitz constant stays what it is: the projection is 1-Lipschitz.
    - No input whatever, NaN included, moves the contribution of the modality to
      a logit difference below :math:`-B \|V_y - V_j\|`: the certificate's
      ``covers({m: inf})`` and an infinite ``modality_radius`` then speak of a
      sensor that is replaced by anything.

  Parameters and their paths are those of ``encoder``. A small radius costs
  accuracy; a large one lets a single modality outvote the others.

  Args:
    encoder: of any kind.
    radius: B, positive.
  """
  if not isinstance(radius, numbers.Real):
    raise ValueError(f"embedding_radius must be a number, got {radius!r}.")
  changes = {"embedding_radius": radius}
  if encoder.encode_tokens is not None:
    changes["encode_tokens"] = functional.bounded_tokens(
      encoder.encode_tokens, radius
    )
  return dataclasses.replace(encoder, **changes)


def mlp(
  *,
  hidden_sizes: Sequence[int] = (128,),
  embedding_dim: int = 64,
  activation: str = "relu",
) -> Encoder:
  """A perceptron for inputs of any shape, flattened."""
  _validate.one_of(networks.ACTIVATIONS, activation=activation)
  _widths(hidden_sizes=hidden_sizes)
  _validate.at_least(1, embedding_dim=embedding_dim)

  def build(input_shape, rngs):
    return networks.MLP(
      input_shape, rngs, hidden_sizes, embedding_dim, activation
    )

  return Encoder(name="mlp", embedding_dim=embedding_dim, build=build)


def cnn(
  *, features: Sequence[int] = (32, 64), embedding_dim: int = 64
) -> Encoder:
  """Strided 3 x 3 convolutions for ``h w c`` (or ``h w``); then dense.

  Video ``t h w c`` is folded: frames become channels. The last map is averaged
  down to at most 8 x 8 positions and flattened.
  """
  _widths(features=features)
  _validate.at_least(1, embedding_dim=embedding_dim)

  def build(input_shape, rngs):
    return networks.CNN(input_shape, rngs, features, embedding_dim)

  return Encoder(name="cnn", embedding_dim=embedding_dim, build=build)


def temporal_cnn(
  *,
  features: Sequence[int] = (96, 96),
  kernel_size: int = 5,
  embedding_dim: int = 64,
) -> Encoder:
  """Strided convolutions over time for ``t d``, mean over time, dense.

  Axes after the first of an input are flattened into features.
  """
  _widths(features=features)
  _validate.at_least(1, kernel_size=kernel_size, embedding_dim=embedding_dim)

  def build(input_shape, rngs):
    return networks.TemporalCNN(
      input_shape, rngs, features, kernel_size, embedding_dim
    )

  return Encoder(name="temporal_cnn", embedding_dim=embedding_dim, build=build)


def transformer(
  *,
  width: int = 64,
  num_layers: int = 2,
  num_heads: int = 4,
  embedding_dim: int = 64,
  vocabulary_size: int | None = None,
) -> Encoder:
  """A transformer over frames ``t d``, or over integer tokens ``t``.

  With ``vocabulary_size`` inputs are tokens, of which 0 is padding: it neither
  attends nor is attended to, and the mean over time leaves it out.
  """
  _validate.at_least(
    1,
    width=width,
    num_layers=num_layers,
    num_heads=num_heads,
    embedding_dim=embedding_dim,
  )
  if width % num_heads:
    raise ValueError(f"num_heads must divide width {width}, got {num_heads}.")
  if vocabulary_size is not None:
    _validate.at_least(2, vocabulary_size=vocabulary_size)

  def build(input_shape, rngs):
    return networks.Transformer(
      input_shape,
      rngs,
      width,
      num_layers,
      num_heads,
      embedding_dim,
      vocabulary_size,
    )

  return Encoder(
    name="transformer",
    embedding_dim=embedding_dim,
    build=build,
    tokens=vocabulary_size is not None,
  )


def resnet18(*, embedding_dim: int = 512, width: int = 64) -> Encoder:
  """ResNet-18 with group normalisation for ``h w c`` (or ``h w``).

  Images up to 64 x 64 get a 3 x 3 stem without stride. Video ``t h w c`` is
  encoded frame by frame and the embeddings are averaged, as the reference
  experiments on Kinetics-Sounds do. Group normalisation in place of batch
  normalisation: no statistics, so an example means the same in any batch.
  """
  _validate.at_least(1, embedding_dim=embedding_dim, width=width)

  def build(input_shape, rngs):
    return networks.ResNet(input_shape, rngs, width, embedding_dim)

  return Encoder(name="resnet18", embedding_dim=embedding_dim, build=build)


def temporal_resnet(
  *,
  width: int = 96,
  num_blocks: int = 2,
  kernel_size: int = 5,
  dropout: float = 0.0,
  velocity: float = 0.0,
  embedding_dim: int = 64,
) -> Encoder:
  """A residual network over time for ``t d``, mean and maximum, dense.

  Axes after the first of an input are flattened into features.

  Args:
    width: features of all convolutions.
    num_blocks: residual blocks; each halves the time.
    kernel_size: frames a convolution sees.
    dropout: rate in every block, and before the last layer.
    velocity: the differences of consecutive frames, times this, join the
      input; 0 for none.
    embedding_dim: d.
  """
  _validate.at_least(1, width=width, embedding_dim=embedding_dim)
  _validate.at_least(1, num_blocks=num_blocks, kernel_size=kernel_size)
  _validate.non_negative(velocity=velocity)
  _validate.below_one(dropout=dropout)

  def build(input_shape, rngs):
    return residual.TemporalResNet(
      input_shape,
      rngs,
      width=width,
      num_blocks=num_blocks,
      kernel_size=kernel_size,
      dropout=dropout,
      velocity=velocity,
      embedding_dim=embedding_dim,
    )

  return Encoder(
    name="temporal_resnet", embedding_dim=embedding_dim, build=build
  )


def video_resnet(
  *,
  features: Sequence[int] = (16, 32, 64),
  pooling: int = 1,
  width: int = 96,
  num_blocks: int = 2,
  dropout: float = 0.0,
  velocity: float = 1.0,
  appearance: bool = True,
  embedding_dim: int = 64,
) -> Encoder:
  """Strided convolutions frame by frame, then a residual network over time.

  Args:
    features: of the convolutions in space, each with stride 2.
    pooling: pixels of a side that are averaged first; divides the frame.
    width: features of a frame, and of the convolutions over time.
    num_blocks: residual blocks over time; each halves it.
    dropout: rate before and in the network over time, and at its end.
    velocity: the differences of consecutive frames and their absolute values,
      times this, are inputs; 0 for none.
    appearance: whether the frames themselves are. Without them there is less to
      recognise persons and places by, and few of them to train on do less harm.
    embedding_dim: d.
  """
  _widths(features=features)
  _validate.at_least(1, pooling=pooling, width=width, num_blocks=num_blocks)
  _validate.at_least(1, embedding_dim=embedding_dim)
  _validate.non_negative(velocity=velocity)
  _validate.below_one(dropout=dropout)
  if not velocity and not appearance:
    raise ValueError("velocity must be positive where appearance is False.")

  def build(input_shape, rngs):
    return residual.VideoResNet(
      input_shape,
      rngs,
      features=tuple(features),
      pooling=pooling,
      width=width,
      num_blocks=num_blocks,
      dropout=dropout,
      velocity=velocity,
      appearance=appearance,
      embedding_dim=embedding_dim,
    )

  return Encoder(name="video_resnet", embedding_dim=embedding_dim, build=build)


def custom(
  build: Callable[..., Any],
  embedding_dim: int,
  *,
  lipschitz: float | Callable[..., Any] | None = None,
  tokens: bool = False,
) -> Encoder:
  """Your own nnx module as an encoder.

  >>> class Mine(nnx.Module):
  ...   def __init__(self, input_shape, rngs):
  ...     self.dense = nnx.Linear(input_shape[0], 8, rngs=rngs)
  ...   def __call__(self, x):
  ...     return nnx.relu(self.dense(x))
  >>> encoder = custom(Mine, 8)

  Args:
    build: ``build(input_shape, rngs) -> nnx.Module``, called with ``[b,
      *input_shape]`` and with ``train=`` and ``key=`` if it takes them.
    embedding_dim: d, the size of what it returns.
    lipschitz: a *sound* l2 bound, or ``lipschitz(module) -> scalar``. Without
      one the module's own ``lipschitz()`` counts, if it has that.
    tokens: True when inputs are integer tokens.
  """
  _validate.at_least(1, embedding_dim=embedding_dim)
  if lipschitz is not None and not callable(lipschitz):
    _validate.positive(lipschitz=lipschitz)
  return Encoder(
    name="custom",
    embedding_dim=embedding_dim,
    build=build,
    tokens=tokens,
    lipschitz=lipschitz,
  )


def from_linen(
  module,
  embedding_dim: int,
  *,
  lipschitz: float | None = None,
  tokens: bool = False,
) -> Encoder:
  """Your own flax.linen module as an encoder, through the nnx bridge.

  Called as ``module(x)``, with ``train=`` and ``key=`` if it takes them;
  dropout and the like draw from the model's key. Collections that change in a
  call (batch statistics in training) are not carried: use nnx for those.
  """

  def build(input_shape, rngs):
    dtype = jnp.int32 if tokens else jnp.float32
    return nnx.bridge.ToNNX(module, rngs=rngs).lazy_init(
      jnp.zeros((1, *input_shape), dtype)
    )

  return custom(build, embedding_dim, lipschitz=lipschitz, tokens=tokens)


def _widths(**arguments) -> None:
  for name, widths in arguments.items():
    for width in widths:
      _validate.at_least(1, **{name: width})


_RADIUS = "embedding_radius"
FACTORIES = {
  "cnn": cnn,
  "lipschitz_cnn": lipschitz_cnn,
  "lipschitz_mlp": lipschitz_mlp,
  "lipschitz_temporal_cnn": lipschitz_temporal_cnn,
  "mlp": mlp,
  "patches": patches,
  "resnet18": resnet18,
  "temporal_cnn": temporal_cnn,
  "temporal_resnet": temporal_resnet,
  "transformer": transformer,
  "video_resnet": video_resnet,
  "vit": vit,
  "vit_tokens": vit_tokens,
}
