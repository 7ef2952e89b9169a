r"""Second derivatives of losses, as maps and never as matrices.

A map is a function ``matvec`` on pytrees like the parameters. Ritz values of it
(:func:`lanczos`, :func:`block_lanczos`) come with residuals: an eigenvalue lies
within that distance. Everything computes in float32 at least, with products at
the highest precision, leaf by leaf: what is sharded stays so.

The function whose curvature is asked for must be the *same* function at every
call: fixed batch, fixed dropout and noise keys. A fresh key for every product
makes a Hessian unsymmetric. ReLU networks have no curvature from their kinks:
prefer smooth activations (GELU, tanh) where curvature decides anything.

References:
  `Pearlmutter (1994) <https://doi.org/10.1162/neco.1994.6.1.147>`_, products;
  `Ghorbani, Krishnan & Xiao (2019) <https://arxiv.org/abs/1901.10159>`_.
"""

import fractions
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import PRNGKeyArray
from jaxtyping import PyTree

from robust_mm import _convolutions
from robust_mm import _validate
from robust_mm.linalg import Ritz
from robust_mm.linalg import SpectralBounds
from robust_mm.linalg import block_lanczos
from robust_mm.linalg import lanczos
from robust_mm.linalg import spectral_bounds
from robust_mm.linalg import trees

__all__ = [
  "Ritz",
  "block_lanczos",
  "check_separable",
  "coupling",
  "fisher_diagonal",
  "ggn_vp",
  "hvp",
  "lanczos",
  "quantile_threshold",
  "spectrum_ends",
]

_SEPARABLE = 1e-6


def hvp(
  fn: Callable[[PyTree], Array],
  params: PyTree,
  *,
  recompute: bool = False,
) -> Callable[[PyTree], PyTree]:
  r"""The Hessian of a function as a map :math:`v \mapsto \nabla^2 f(\theta) v`.

  The gradient is linearised once, at about two gradients, and every product
  costs about two gradients more.

  >>> matvec = hvp(lambda x: jnp.sum(x**3), jnp.array([1.0, 2.0]))
  >>> matvec(jnp.array([1.0, 1.0])).tolist()
  [6.0, 12.0]

  Formal guarantees:
    - Symmetric up to rounding where ``fn`` is twice differentiable.
    - Linear in v; exact, no finite differences.

  Args:
    fn: ``fn(params) -> scalar``.
    params: floating pytree.
    recompute: differentiate the gradient anew in every product. The
      linearisation otherwise keeps the intermediate values of one gradient,
      which is what rematerialised models cannot afford; a product then costs
      about half as much again.

  Returns:
    ``matvec(vector) -> vector`` on pytrees like ``params``, in float32
    (float64 for float64 leaves).

  Raises:
    ValueError: naming the leaf of ``params`` that is not floating point.
  """
  trees.check_floating(params=params)
  params = trees.upcast(params)
  gradient = jax.grad(fn)
  if recompute:

    def product(vector):
      return jax.jvp(gradient, (params,), (vector,))[1]

  else:
    with jax.default_matmul_precision("highest"):
      _, product = jax.linearize(gradient, params)
  return _on_upcast(product, params)


def ggn_vp(
  model_fn: Callable[[PyTree], PyTree],
  loss_fn: Callable[[PyTree], Array],
  params: PyTree,
) -> Callable[[PyTree], PyTree]:
  r"""The generalised Gauss-Newton map :math:`v \mapsto J^T H_L J v`.

  J is the Jacobian of ``model_fn`` and :math:`H_L` the Hessian of ``loss_fn``
  in its outputs.

  Formal guarantees:
    - Symmetric; positive semidefinite where ``loss_fn`` is convex. Its
      smallest eigenvalue therefore says nothing about negative curvature.
    - Equal to the Hessian of the composition where ``model_fn`` is linear.

  Args:
    model_fn: ``model_fn(params) -> outputs``, a floating pytree.
    loss_fn: ``loss_fn(outputs) -> scalar``.
    params: floating pytree.

  Returns:
    ``matvec(vector) -> vector``, as that of :func:`hvp`.

  References:
    `Schraudolph (2002) <https://doi.org/10.1162/08997660260028683>`_.
  """
  trees.check_floating(params=params)
  params = trees.upcast(params)
  with jax.default_matmul_precision("highest"):
    outputs, push = jax.linearize(model_fn, params)
    pull = jax.linear_transpose(push, params)
    _, hessian = jax.linearize(jax.grad(loss_fn), outputs)

  def product(vector):
    return pull(hessian(push(vector)))[0]

  return _on_upcast(product, params)


def fisher_diagonal(
  per_example_loss_fn: Callable[[PyTree, PyTree], Array],
  params: PyTree,
  batch: PyTree,
  *,
  chunk_size: int = 16,
) -> PyTree:
  r"""The diagonal of the empirical Fisher matrix.

  .. math:: F_i = \frac1b \sum_e \Bigl(
            \frac{\partial \ell_e}{\partial \theta_i}\Bigr)^2

  The mean of squares, not the square of the mean: at an optimum the squared
  gradient of a batch is too small by the size of the batch in expectation.

  Memory is ``chunk_size`` gradients. A chunk takes every ``b // chunk_size``-th
  example, so that a batch sharded over devices is worked on by all of them
  when their number divides ``chunk_size``.

  Args:
    per_example_loss_fn: ``(params, example) -> scalar``; an example is
      ``batch`` without its leading axis.
    params: floating pytree.
    batch: pytree of arrays ``[b, ...]``.
    chunk_size: gradients at a time.

  Returns:
    A tree like ``params``, non-negative, float32 at least.

  Raises:
    ValueError: naming ``batch`` where it has no examples or leaves of
      different lengths.

  References:
    `Kunstner, Balles & Hennig (2019) <https://arxiv.org/abs/1905.12558>`_ on
    what the empirical Fisher is not.
  """
  _validate.at_least(1, chunk_size=chunk_size)
  trees.check_floating(params=params)
  number = _num_examples(batch)
  like, params = params, trees.upcast(params)
  chunk = min(chunk_size, number)
  num_chunks, rest = divmod(number, chunk)

  def squares(examples):
    grads = jax.vmap(jax.grad(per_example_loss_fn), in_axes=(None, 0))(
      params, examples
    )
    return jax.tree.map(lambda g: jnp.sum(jnp.square(g), axis=0), grads)

  def step(total, examples):
    found = _convolutions.canonical(squares, examples)
    return jax.tree.map(jnp.add, total, found), None

  def split(x):
    x = x[: number - rest] if rest else x
    # Strided: the axis that may be sharded stays in front of the split.
    return jnp.swapaxes(jnp.reshape(x, (chunk, num_chunks, *x.shape[1:])), 0, 1)

  with jax.default_matmul_precision("highest"):
    total, _ = jax.lax.scan(
      step, trees.zeros_like(params), jax.tree.map(split, batch)
    )
    if rest:
      last = jax.tree.map(lambda x: x[number - rest :], batch)
      total, _ = step(total, last)
  return jax.tree.map(
    lambda t, leaf: trees.sharded_as(t / number, leaf), total, like
  )


def spectrum_ends(
  fn: Callable[[PyTree], Array],
  params: PyTree,
  key: PRNGKeyArray,
  *,
  num_steps: int = 20,
  failure_probability: float = 1e-3,
  recompute: bool = False,
) -> SpectralBounds:
  """An interval that holds the Hessian's spectrum, with a probability.

  Formal guarantees:
    - ``smallest`` and ``largest`` lie inside the spectrum, always.
    - ``lower`` and ``upper`` lie outside with probability ``1 -
      failure_probability`` over the start vector, in exact arithmetic.

  Args:
    fn: ``fn(params) -> scalar``.
    params: floating pytree.
    key: of the start vector; a fresh one for every call.
    num_steps: products.
    failure_probability: of both ends together.
    recompute: see :func:`hvp`.

  Raises:
    ValueError: naming ``num_steps`` where it is too small for the statement.
  """
  return spectral_bounds(
    hvp(fn, params, recompute=recompute),
    params,
    key,
    num_steps=num_steps,
    failure_probability=failure_probability,
  )


def quantile_threshold(tree: PyTree, quantile: float) -> Float[Array, ""]:
  r"""The order statistic of rank :math:`\lceil q n \rceil` of all n scalars.

  >>> tree = {"a": jnp.array([5.0, 1.0]), "b": jnp.array([3.0, 2.0, 4.0])}
  >>> float(quantile_threshold(tree, 0.4))
  2.0

  No sort and no gather: floats are ordered as their bit patterns are, so that
  32 counts (64 in float64) find it by bisection, and only counts are reduced
  over devices. Bisection on values would not do on wide ranges.

  Formal guarantees:
    - Exact: the returned number is an element of the tree, bit for bit
      (subnormal ones included). At least ``ceil(q n)`` elements are ``<=`` it
      and fewer are ``<`` it.
    - q is read as the decimal number it prints as: 0.1 of 30 elements is 3.

  Args:
    tree: floating pytree with fewer than 2**31 scalars. NaN counts as larger
      than anything; -0 comes before 0.
    quantile: in (0, 1], static.

  Raises:
    ValueError: for a quantile outside (0, 1] or too large a tree.
  """
  check_quantile(quantile)
  trees.check_floating(tree=tree)
  number = trees.size(tree)
  if number >= 2**31:
    raise ValueError(f"tree must hold fewer than 2**31 scalars, got {number}.")
  rank = math.ceil(fractions.Fraction(str(float(quantile))) * number)
  leaves = jax.tree.leaves(tree)
  dtype = functools.reduce(
    jnp.promote_types, [leaf.dtype for leaf in leaves], jnp.float32
  )
  ordered = [_ordered_bits(leaf.astype(dtype)) for leaf in leaves]
  integer = ordered[0].dtype
  limits = jnp.iinfo(integer)

  def halve(_, ends):
    low, high = ends
    # The floor of the mean, without overflow.
    middle = (low & high) + ((low ^ high) >> 1)
    below = sum(jnp.sum(bits <= middle, dtype=jnp.int32) for bits in ordered)
    enough = below >= rank
    return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

  ends = jnp.asarray(limits.min, integer), jnp.asarray(limits.max, integer)
  low, _ = jax.lax.fori_loop(0, limits.bits, halve, ends)
  return jax.lax.bitcast_convert_type(_flip_negative(low), dtype)


def check_quantile(quantile: float) -> None:
  """In (0, 1], or a ValueError."""
  if not 0 < quantile <= 1:
    raise ValueError(f"quantile must lie in (0, 1], got {quantile}.")


def coupling(
  matvec: Callable[[PyTree], PyTree],
  like: PyTree,
  labels: PyTree,
  key: PRNGKeyArray,
) -> Float[Array, ""]:
  r"""How far a symmetric map is from being block diagonal; 0 if it is.

  .. math:: \max_j \frac{\| (H v_j)_{-j} \|}{\max_i \| H v_i \|}

  with a random :math:`v_j` that is zero outside block j. One product a block.

  Args:
    matvec: symmetric.
    like: gives structure, shapes and shardings.
    labels: pytree of str like ``like``.
    key: of the vectors.
  """
  of_leaf = jax.tree.leaves(labels)
  vector = trees.random_normal(key, like)
  outside, whole = [], []
  for name in sorted(set(of_leaf)):
    own = _only(vector, of_leaf, lambda label, name=name: label == name)
    image = matvec(own)
    rest = _only(image, of_leaf, lambda label, name=name: label != name)
    outside.append(trees.norm(rest))
    whole.append(trees.norm(image))
  largest = jnp.max(jnp.stack(whole))
  share = jnp.max(jnp.stack(outside)) / jnp.where(largest > 0, largest, 1)
  return jnp.where(largest == 0, 0, share)


def check_separable(
  matvec: Callable[[PyTree], PyTree],
  like: PyTree,
  labels: PyTree,
  key: PRNGKeyArray,
) -> None:
  """Refuses a map that couples blocks by more than 1e-6.

  Outside ``jit`` a ValueError; inside, the message comes with the error of the
  running program. :func:`block_lanczos` of a coupled map is wrong silently.
  """
  found = coupling(matvec, like, labels, key)
  if isinstance(found, jax.core.Tracer):
    jax.debug.callback(_refuse_coupling, found)
  else:
    _refuse_coupling(found)


def _refuse_coupling(found) -> None:
  if not found <= _SEPARABLE:
    raise ValueError(
      f"separable must be False: the blocks are coupled, by {float(found):.1e} "
      f"of the largest product (at most {_SEPARABLE:.0e})."
    )


def _only(tree, of_leaf, chosen):
  leaves, structure = jax.tree.flatten(tree)
  kept = [
    leaf if chosen(label) else jnp.zeros_like(leaf)
    for leaf, label in zip(leaves, of_leaf)
  ]
  return jax.tree.unflatten(structure, kept)


def _on_upcast(product, params):
  def matvec(vector):
    vector = trees.cast_like(vector, params)
    with jax.default_matmul_precision("highest"):
      return _convolutions.canonical(product, vector)

  return matvec


def _num_examples(batch) -> int:
  lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
  if len(lengths) != 1 or lengths == {()} or lengths == {(0,)}:
    raise ValueError(
      "batch must hold arrays with one leading axis of examples, of one "
      f"length that is not 0; got {sorted(lengths)}."
    )
  return lengths.pop()[0]


def _ordered_bits(x: Array) -> Array:
  """Integers that are ordered as the floats are."""
  integer = jnp.int64 if x.dtype == jnp.float64 else jnp.int32
  return _flip_negative(jax.lax.bitcast_convert_type(x, integer))


def _flip_negative(bits: Array) -> Array:
  """Its own inverse: all bits but the sign, of negative numbers."""
  most = jnp.asarray(jnp.iinfo(bits.dtype).max, bits.dtype)
  return jnp.where(bits < 0, bits ^ most, bits)
