"""One hyper-gradient from solver, operator and bounds, with its evidence."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import PRNGKeyArray
from jaxtyping import PyTree

from robust_mm import linalg
from robust_mm.hypergrad import bounds as bounds_lib
from robust_mm.hypergrad import certificates
from robust_mm.hypergrad import iterations
from robust_mm.hypergrad import operators
from robust_mm.hypergrad import products
from robust_mm.linalg import trees


class HypergradientInfo(NamedTuple):
  """What is known of one hyper-gradient; arrays only.

  Attributes:
    accepted: the step may be taken: the gradient error bound is small enough
      and nothing contradicts it.
    certified: bounds and solve are finite, mu > 0 and no observation refuted
      them. Only then do the two error bounds mean anything.
    sign_certified: like phi: the sign of this coordinate is that of the
      exactly solved system.
    solve_error_bound: of ``||A^-1 v - x||``.
    prior_error_bound: the same before the solve, from the number of steps and
      the bounds alone; infinite where they say nothing, or the solver is not
      one of this package. With ``max_steps`` that of the first round.
    contraction: at most so much of the error is left by one more step of the
      solver; 1 or more promises nothing.
    gradient_error_bound: E, of ``||ghat - (d - B^T A^-1 v)||``.
    relative_residual: ``||v - A x|| / ||v||``.
    num_matvecs: products with H that were spent, Lanczos included.
    lower: l, at most the smallest eigenvalue of H.
    upper: L, at least the largest.
    damping: what was added to the diagonal of H.
    step_size: alpha, of the Neumann series for A.
    failure_probability: that l, L or the bound of ``||B||`` is wrong, over the
      random starts; 1 for cached bounds, of which nothing is known.
    negative_curvature: A was seen not to be positive definite.
    inner_gradient_norm: of inner in theta. No bound here sees what it causes;
      always look at it.
    bounds_age: outer steps since l and L were computed.
  """

  accepted: Bool[Array, ""]
  certified: Bool[Array, ""]
  sign_certified: PyTree
  solve_error_bound: Float[Array, ""]
  prior_error_bound: Float[Array, ""]
  contraction: Float[Array, ""]
  gradient_error_bound: Float[Array, ""]
  relative_residual: Float[Array, ""]
  num_matvecs: Int[Array, ""]
  lower: Float[Array, ""]
  upper: Float[Array, ""]
  damping: Float[Array, ""]
  step_size: Float[Array, ""]
  failure_probability: Float[Array, ""]
  negative_curvature: Bool[Array, ""]
  inner_gradient_norm: Float[Array, ""]
  bounds_age: Int[Array, ""]


class Problem(NamedTuple):
  """Arguments in the precision of the solve, and the functions."""

  inner: Callable
  outer: Callable
  theta: PyTree
  phi: PyTree
  dtypes: PyTree


class Sensitivity(NamedTuple):
  """How long the columns of B are; or a bound that serves for all of them."""

  columns: PyTree
  total: Array
  failure_probability: float


class Situation(NamedTuple):
  """What is settled before the solve."""

  point: products.Linearized
  v: PyTree
  d: PyTree
  spectrum: linalg.SpectralBounds
  system: operators.Shifted
  sensitivity: Sensitivity
  known: bool


class Result(NamedTuple):
  """A gradient, the solve behind it and the bounds of its error."""

  gradient: PyTree
  solution: iterations.Solution
  solve_error: Array
  errors: PyTree
  total: Array


def pose(
  inner: Callable,
  outer: Callable,
  theta: PyTree,
  phi: PyTree,
  inner_batch: Any = None,
  outer_batch: Any = None,
) -> Problem:
  """Checks and casts the arguments of a call.

  Raises:
    ValueError: naming the argument.
  """
  trees.check_floating(theta=theta, phi=phi)
  dtypes = jax.tree.map(jnp.result_type, phi)
  theta, phi, inner_batch, outer_batch = products.raise_precision(
    theta, phi, inner_batch, outer_batch
  )
  return Problem(
    inner=products.prepare("inner", inner, inner_batch),
    outer=products.prepare("outer", outer, outer_batch),
    theta=theta,
    phi=phi,
    dtypes=dtypes,
  )


def measure(
  bounds: Callable | None, hessian: Callable, theta: PyTree, key: PRNGKeyArray
) -> linalg.SpectralBounds:
  """The ends of the spectrum of H; infinite where nothing is known."""
  if bounds is None:
    return bounds_lib.no_bounds(theta)
  return bounds(hessian, theta, key)


def evaluate(
  setting: Any,
  problem: Problem,
  key: PRNGKeyArray,
  spectrum: linalg.SpectralBounds | None,
  age: Int[Array, ""],
) -> tuple[PyTree, HypergradientInfo]:
  """What ``Hypergradient.__call__`` returns."""
  bounds_key, norm_key = jax.random.split(key)
  point = products.linearize(problem.inner, problem.theta, problem.phi)
  spent, known = 0, spectrum is not None
  if not known:
    spectrum = measure(setting.bounds, point.hessian, problem.theta, bounds_key)
    known = setting.bounds is not None
    spent = setting.bounds.num_matvecs(problem.theta) if known else 0
  push = products.columns(problem.inner, problem.theta, problem.phi)
  v, d = jax.grad(problem.outer, argnums=(0, 1))(problem.theta, problem.phi)
  situation = Situation(
    point=point,
    v=v,
    d=d,
    spectrum=spectrum,
    system=setting.operator(point.hessian, spectrum),
    sensitivity=_sensitivity(setting, push, point.mixed, problem.phi, norm_key),
    known=known,
  )
  result = _solve(setting, situation)
  if setting.correction:
    result = _correct(setting, situation.system, push, problem.phi, result)
  finite, info = _info(setting, situation, result, age)
  info = info._replace(num_matvecs=info.num_matvecs + spent)
  keep = info.accepted if setting.on_reject == "zero" else finite
  gradient = jax.tree.map(
    lambda g, dtype: jnp.where(keep, g, 0).astype(dtype),
    result.gradient,
    problem.dtypes,
  )
  return jax.lax.stop_gradient((gradient, info))


def _info(setting, situation, result, age) -> tuple[Array, HypergradientInfo]:
  """Is the gradient finite, and what is known of it."""
  found, system, size = (
    result.solution,
    situation.system,
    trees.norm(situation.v),
  )
  spectrum = situation.spectrum
  finite, certified, accepted = _verdicts(setting, situation, result, size)
  step_size = getattr(setting.solver, "step_size", None)
  if step_size is None:
    step_size = system.interval.step_size
  contraction, prior = _prior(setting.solver, system.interval, size)
  failure = spectrum.failure_probability
  failure = failure + situation.sensitivity.failure_probability
  return finite, HypergradientInfo(
    accepted=accepted,
    certified=certified,
    sign_certified=jax.tree.map(
      lambda g, e: certified & (jnp.abs(g) > e), result.gradient, result.errors
    ),
    solve_error_bound=result.solve_error,
    prior_error_bound=prior,
    contraction=contraction,
    gradient_error_bound=result.total,
    relative_residual=trees.norm(found.residual)
    / jnp.where(size == 0, 1, size),
    num_matvecs=found.num_matvecs,
    lower=spectrum.lower,
    upper=spectrum.upper,
    damping=system.damping,
    step_size=jnp.asarray(step_size),
    # Of cached bounds nothing is known.
    failure_probability=jnp.where(age > 0, 1, jnp.minimum(failure, 1)),
    negative_curvature=found.negative_curvature,
    inner_gradient_norm=trees.norm(situation.point.gradient),
    bounds_age=age,
  )


def _prior(solver, interval, size) -> tuple[Array, Array]:
  """(contraction, bound of the error) that are known before the solve."""
  nothing = jnp.full_like(size, jnp.inf)
  if not hasattr(solver, "prior_share"):
    return nothing, nothing
  share = solver.prior_share(interval)
  # Infinite bounds of an unknown spectrum are nothing, not a number.
  known = jnp.isfinite(share) & jnp.isfinite(interval.upper)
  bound = certificates.a_posteriori_error(share * size, interval.lower)
  return (
    jnp.where(known, solver.contraction(interval), nothing),
    jnp.where(known, bound, nothing),
  )


def _solve(setting, situation) -> Result:
  mixed, sensitivity = situation.point.mixed, situation.sensitivity
  lower, d = situation.system.interval.lower, situation.d

  def accept(x, residual):
    error = certificates.a_posteriori_error(trees.norm(residual), lower)
    gradient = trees.axpy(-1, mixed(x), d)
    return certificates.acceptable(
      sensitivity.total * error, trees.norm(gradient), setting.acceptance
    )

  found = solve(setting.solver, situation.system, situation.v, accept)
  error = certificates.a_posteriori_error(trees.norm(found.residual), lower)

  def of_gradient(length):  # 0 times infinity: no sensitivity, no error.
    return jnp.where(length == 0, 0, length * error)

  return Result(
    gradient=trees.axpy(-1, mixed(found.x), d),
    solution=found,
    solve_error=error,
    errors=jax.tree.map(of_gradient, sensitivity.columns),
    total=of_gradient(sensitivity.total),
  )


def solve(
  solver: Callable,
  system: operators.Shifted,
  rhs: PyTree,
  accept: Callable | None = None,
) -> iterations.Solution:
  """The solver called as its protocol says."""
  if accept is None or getattr(solver, "max_steps", None) is None:
    return solver(system.matvec, rhs, system.interval)
  return solver(system.matvec, rhs, system.interval, accept=accept)


def _sensitivity(setting, push, mixed, phi, key) -> Sensitivity:
  size = trees.size(phi)
  if size <= setting.max_explicit:
    norms = products.column_norms(push, phi)
    total = jnp.sqrt(jnp.sum(jnp.square(norms)))
    return Sensitivity(products.unravel(norms, phi), total, 0.0)
  if setting.correction:
    raise ValueError(
      f"correction needs phi of at most max_explicit={setting.max_explicit} "
      f"scalars, got {size}."
    )
  failure = products.MIXED_FAILURE
  total = products.lanczos_mixed_norm(push, mixed, phi, key, failure)
  columns = jax.tree.map(lambda leaf: jnp.full_like(leaf, total), phi)
  return Sensitivity(columns, total, failure)


def _correct(setting, system, push, phi, result) -> Result:
  """Adds ``y_j^T r``; what is left is the product of two residuals."""
  found, lower = result.solution, system.interval.lower
  rest = trees.norm(found.residual)

  def column(j):
    rhs = push(products.basis_vector(j, phi))
    other = solve(setting.solver, system, rhs)
    left = trees.norm(other.residual)
    return (
      trees.dot(other.x, found.residual),
      certificates.a_posteriori_error(left * rest, lower),
      other.num_matvecs,
      other.negative_curvature,
      other.refuted,
    )

  gains, errors, spent, negative, refuted = jax.lax.map(
    column, jnp.arange(trees.size(phi))
  )
  return result._replace(
    gradient=trees.axpy(-1, products.unravel(gains, phi), result.gradient),
    solution=found._replace(
      num_matvecs=found.num_matvecs + jnp.sum(spent),
      negative_curvature=found.negative_curvature | jnp.any(negative),
      refuted=found.refuted | jnp.any(refuted),
    ),
    errors=products.unravel(errors, phi),
    total=jnp.sqrt(jnp.sum(jnp.square(errors))),
  )


def _verdicts(setting, situation, result, size):
  """``finite, certified, accepted``."""
  found, length = result.solution, trees.norm(result.gradient)
  ends = jnp.stack([situation.spectrum.lower, situation.spectrum.upper])
  norms = [length, trees.norm(found.x), trees.norm(found.residual)]
  bounded = jnp.all(jnp.isfinite(ends))
  finite = jnp.all(jnp.isfinite(jnp.stack(norms)))
  finite = finite & bounded if situation.known else finite
  certified = finite & bounded & (situation.system.interval.lower > 0)
  certified = certified & ~found.refuted & ~found.negative_curvature
  if setting.acceptance is None:
    return finite, certified, finite
  small = certificates.acceptable(result.total, length, setting.acceptance)
  # x = 0 solves A x = 0 whatever A is.
  return finite, certified, finite & ((certified & small) | (size == 0))
