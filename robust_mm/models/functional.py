"""Flax nnx modules as pure functions over plain dict pytrees.

Nothing outside ``models`` sees a flax object: parameters and state are nested
dicts with string keys, so that regex rules, optax and checkpoints see paths
such as ``encoders/audio/dense/kernel``.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import PRNGKeyArray

from robust_mm import _compiling
from robust_mm import _validate
from robust_mm import margins
from robust_mm._types import Params
from robust_mm._types import PyTree
from robust_mm._types import State


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Encoder:
  """One modality's encoder as a value: what to build, not yet built.

  Attributes:
    name: of its factory.
    embedding_dim: d, the size of the embedding.
    build: ``build(input_shape, rngs) -> nnx.Module`` for inputs ``[b,
      *input_shape]``. The module is called ``module(x, train=, key=)`` (each
      keyword only if it takes it) and returns ``[b, d]``.
    one_lipschitz: True when the embedding is 1-Lipschitz by construction.
    tokens: True when inputs are integer tokens, 0 for padding.
    lipschitz: a sound bound, or ``lipschitz(module) -> scalar | None``; by
      default the module's own ``lipschitz()`` if it has one.
    embedding_radius: B, where embeddings are projected on the ball of that
      radius, see ``encoders.bounded``; None for no projection.
    tokenizer: of an encoder that gives tokens ``[b, N, d]`` in place of one
      embedding (a ``patches.Tokenizer``); None of others.
    normalizes: True when the module normalises raw inputs itself; the model's
      normalisation then leaves this modality alone.
    embed: of an encoder that can be split at its tokens, ``embed(params,
      state, x) -> tokens [b, N, d]``, affine in x; None of others.
    encode_tokens: the rest of it, ``encode_tokens(params, state, tokens,
      present, *, train=False, key=None) -> (embedding, state)``, with
      ``present`` bool ``[b]``, ``[b, N]`` or None. After ``embed`` it is what
      ``encoder_functions(...).apply`` computes, bit for bit.
    pretrained: ``pretrained(input_shape, key) -> params`` that a model begins
      with in place of random ones; None of others.
  """

  name: str
  embedding_dim: int
  build: Callable[..., Any]
  one_lipschitz: bool = False
  tokens: bool = False
  lipschitz: Callable[..., Any] | float | None = None
  embedding_radius: float | None = None
  tokenizer: Any = None
  normalizes: bool = False
  embed: Callable[..., Any] | None = None
  encode_tokens: Callable[..., Any] | None = None
  pretrained: Callable[..., Any] | None = None

  def __post_init__(self):
    if self.embedding_radius is None:
      return
    if self.tokenizer is not None:
      raise ValueError("embedding_radius must be None for tokens (patches).")
    # The float32 that the projection and the certificate both compute with.
    with np.errstate(over="ignore"):
      radius = float(np.float32(self.embedding_radius))
    _validate.positive(embedding_radius=radius)
    object.__setattr__(self, "embedding_radius", radius)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Functions:
  """A module as functions.

  Attributes:
    init: ``init(key) -> (params, state)``, plain dicts.
    apply: ``apply(params, state, *args, train=False, key=None) -> (output,
      state)``. Random streams of the module are seeded from ``key``.
    bind: ``bind(params, state) -> module`` in evaluation mode; change of it
      reaches nothing.
    freeze: ``freeze(params) -> (functions, params)`` that do the same at these
      parameters, with what parts compute from them alone (``part.freeze()``)
      computed once; not to be trained.
    project: ``project(params) -> params`` with weights put back into the set
      they belong to (``part.project()`` where ``part.projects``), or None.
    stateful: True when there is any state; such a module is not frozen.
  """

  init: Callable[..., Any]
  apply: Callable[..., Any]
  bind: Callable[..., Any]
  freeze: Callable[..., Any]
  project: Callable[..., Any] | None
  stateful: bool


def from_module(build: Callable[[nnx.Rngs], nnx.Module]) -> Functions:
  """Pure functions of ``build(rngs) -> nnx.Module``.

  ``state`` holds every variable that is neither a parameter nor a random
  stream: batch statistics, caches.
  """

  def init(key: PRNGKeyArray) -> tuple[Params, State]:
    _, params, _, state = nnx.split(
      build(nnx.Rngs(key)), nnx.Param, nnx.RngState, ...
    )
    return _to_dict(params), _to_dict(state)

  return _functions(nnx.eval_shape(lambda: build(nnx.Rngs(0))), init)


def _functions(abstract: nnx.Module, init: Callable) -> Functions:
  """The functions of modules like ``abstract``."""
  graphdef, param_spec, random_spec, other_spec = nnx.split(
    abstract, nnx.Param, nnx.RngState, ...
  )
  stateful = bool(jax.tree.leaves(other_spec))

  def bind(params, state, *, train=False, key=None):
    # copy=True, or BatchNorm inside jax.grad fails: nnx.merge shares
    # variables by default, and updates them in an outer trace.
    module = nnx.merge(
      graphdef,
      _from_dict(param_spec, params),
      _random_state(random_spec, key),
      _from_dict(other_spec, state),
      copy=True,
    )
    module.train() if train else module.eval()
    return module

  def apply(params, state, *args, train=False, key=None):
    module = bind(params, state, train=train, key=key)
    output = call(module, *args, train=train, key=key)
    _, _, _, state = nnx.split(module, nnx.Param, nnx.RngState, ...)
    return output, _to_dict(state)

  def frozen(params):
    module = bind(params, {})
    for part in _freezable(module):
      part.freeze()
    return module

  def values(params):
    return _to_dict(nnx.state(frozen(params), nnx.Param))

  def project_params(params):
    module = bind(params, {})
    for part in _projected_parts(module):
      part.project()
    return _to_dict(nnx.state(module, nnx.Param))

  def freeze(params):
    if stateful or not _freezable(abstract):
      return functions, params
    fixed = _functions(nnx.eval_shape(frozen, params), init)
    once = _compiling.options_for_once()
    return fixed, jax.jit(values, compiler_options=once)(params)

  functions = Functions(
    init=init,
    apply=apply,
    bind=bind,
    freeze=freeze,
    project=project_params
    if _projected_parts(abstract) and not stateful
    else None,
    stateful=stateful,
  )
  return functions


def _freezable(module: nnx.Module) -> list[nnx.Module]:
  parts = [part for _, part in nnx.iter_modules(module)]
  return [part for part in parts if hasattr(part, "freeze")]


def _projected_parts(module: nnx.Module) -> list[nnx.Module]:
  parts = [part for _, part in nnx.iter_modules(module)]
  return [part for part in parts if getattr(part, "projects", False)]


def call(module: nnx.Module, *args, train: bool, key) -> Any:
  """Calls a module with those of ``train`` and ``key`` it takes."""
  # A bridged linen module takes anything and passes it on.
  target = getattr(module, "to_nnx__module", module)
  accepted = inspect.signature(type(target).__call__).parameters
  anything = any(
    p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values()
  )
  given = {"train": train, "key": key}
  return module(
    *args,
    **{
      name: value
      for name, value in given.items()
      if anything or name in accepted
    },
  )


def encoder_functions(
  encoder: Encoder, input_shape: tuple[int, ...]
) -> Functions:
  """The functions of an encoder for inputs ``[b, *input_shape]``.

  With the projection on its ball, and its pretrained parameters, if it has any.
  """
  input_shape = tuple(input_shape)
  plain = from_module(lambda rngs: encoder.build(input_shape, rngs))
  if encoder.pretrained is not None:
    plain = dataclasses.replace(
      plain, init=lambda key: (encoder.pretrained(input_shape, key), {})
    )
  radius = encoder.embedding_radius
  return plain if radius is None else _bounded(plain, radius)


def _bounded(plain: Functions, radius: float) -> Functions:
  def apply(params, state, *args, train=False, key=None):
    output, state = plain.apply(params, state, *args, train=train, key=key)
    return project(output, radius, keep_bad=train), state

  def freeze(params):
    fixed, params = plain.freeze(params)
    return _bounded(fixed, radius), params

  return dataclasses.replace(plain, apply=apply, freeze=freeze)


def bounded_tokens(encode_tokens: Callable, radius: float) -> Callable:
  """``Encoder.encode_tokens`` with the projection; it replaces an earlier."""
  plain = inspect.unwrap(encode_tokens)

  @functools.wraps(plain)
  def encode(params, state, tokens, present, *, train=False, key=None):
    output, state = plain(params, state, tokens, present, train=train, key=key)
    return project(output, radius, keep_bad=train), state

  return encode


def project(
  embedding: Float[Array, "b d"], radius: float, *, keep_bad: bool = False
) -> Float[Array, "b d"]:
  r"""Projection on a ball, :math:`z \min(1, B / \|z\|)`; 1-Lipschitz.

  A row that is not finite (an input of NaN, an overflow) becomes zero, which
  is in the ball as well: a sensor that delivers NaN moves the logits no
  further than any other. With ``keep_bad`` it stays, so that training sees a
  loss that has diverged.
  """
  length = margins.norm(embedding)[..., None]
  bound = jnp.asarray(radius, embedding.dtype)
  outside = length > bound
  scale = jnp.where(outside, bound / jnp.where(outside, length, 1), 1)
  projected = embedding * scale
  if keep_bad:
    return projected
  good = jnp.all(jnp.isfinite(embedding), axis=-1, keepdims=True)
  return jnp.where(good, projected, jnp.zeros_like(projected))


def encoder_constant(
  encoder: Encoder, functions: Functions, params: Params
) -> Array | None:
  """The encoder's sound Lipschitz bound, float32 ``[]``, or None.

  None as well where the bound would have to be read off a module with state
  (batch statistics): the geometry of a model depends on parameters only.
  """
  constant = encoder.lipschitz
  if constant is None or callable(constant):
    if functions.stateful:
      return None
    module = functions.bind(params, {})
    if constant is None:
      constant = getattr(module, "lipschitz", lambda: None)()
    else:
      constant = constant(module)
  return None if constant is None else jnp.asarray(constant, jnp.float32)


def encoder_chain(
  encoder: Encoder, functions: Functions, params: Params
) -> tuple[Array, ...] | None:
  """The dense layers of an encoder that consists of nothing else, or None.

  From the module's own ``chain()``; not where a projection follows, or where
  the bound is somebody's own.
  """
  custom = encoder.lipschitz is not None or encoder.embedding_radius is not None
  if custom or functions.stateful:
    return None
  module = functions.bind(params, {})
  return getattr(module, "chain", lambda: None)()


def encoder_linear(
  functions: Functions, params: Params
) -> tuple[Array, ...] | None:
  """Matrices with the norms of an encoder's linear maps, or None.

  From the module's own ``linear_maps()``.
  """
  if functions.stateful:
    return None
  module = functions.bind(params, {})
  return getattr(module, "linear_maps", lambda: None)()


def _to_dict(state: PyTree) -> dict:
  """A plain dict with string keys; lists of modules have integer ones."""

  def rename(tree):
    if not isinstance(tree, dict):
      return tree
    return {str(name): rename(value) for name, value in tree.items()}

  return rename(nnx.to_pure_dict(state))


def _from_dict(spec: PyTree, tree: PyTree) -> PyTree:
  """The nnx.State of the structure of ``spec`` with the leaves of ``tree``."""

  def restore(spec_tree, tree):
    if not isinstance(spec_tree, dict):
      return tree
    return {
      name: restore(value, tree[str(name)]) for name, value in spec_tree.items()
    }

  state = jax.tree.map(lambda leaf: leaf, spec)
  nnx.replace_by_pure_dict(state, restore(nnx.to_pure_dict(spec), tree))
  return state


def _random_state(spec: PyTree, key: PRNGKeyArray | None) -> PyTree:
  """Random streams restarted from ``key``: keys folded in, counts zero."""
  key = jax.random.key(0) if key is None else key
  leaves, structure = jax.tree.flatten(spec)
  values = [
    jax.random.fold_in(key, index)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    else jnp.zeros(leaf.shape, leaf.dtype)
    for index, leaf in enumerate(leaves)
  ]
  return jax.tree.unflatten(structure, values)
