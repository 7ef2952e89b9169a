"""The front door: the gradient of an outer loss through an inner optimum."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Int
from jaxtyping import PRNGKeyArray
from jaxtyping import PyTree

from robust_mm import _validate
from robust_mm import linalg
from robust_mm.hypergrad import bounds as bounds_lib
from robust_mm.hypergrad import engine
from robust_mm.hypergrad import operators
from robust_mm.hypergrad import products
from robust_mm.hypergrad import solvers

# Stands for "not given" where None has a meaning.
DEFAULT: Any = type("Default", (), {"__repr__": lambda _: "default"})()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hypergradient:
  """Made by :func:`hypergradient`; hashable, to be called under ``jax.jit``."""

  inner: Callable
  outer: Callable
  solver: Callable
  operator: Callable
  bounds: Callable | None
  acceptance: float | None
  on_reject: str
  correction: bool
  max_explicit: int

  def spectral_bounds(
    self,
    theta: PyTree,
    phi: PyTree,
    inner_batch: Any = None,
    *,
    key: PRNGKeyArray,
  ) -> linalg.SpectralBounds:
    """The ends of the spectrum of H, to be kept for later calls."""
    problem = engine.pose(self.inner, self.outer, theta, phi, inner_batch)
    with jax.default_matmul_precision("highest"):
      point = products.linearize(problem.inner, problem.theta, problem.phi)
      found = engine.measure(self.bounds, point.hessian, problem.theta, key)
    return jax.lax.stop_gradient(found)

  def __call__(
    self,
    theta: PyTree,
    phi: PyTree,
    inner_batch: Any = None,
    outer_batch: Any = None,
    *,
    key: PRNGKeyArray,
    spectrum: linalg.SpectralBounds | None = None,
    bounds_age: int | Int[Array, ""] = 0,
  ) -> tuple[PyTree, engine.HypergradientInfo]:
    """``(gradient like phi, HypergradientInfo)``; not itself differentiable.

    Args:
      theta: the parameters, as near to a minimum of inner as they come.
      phi: the meta-parameters.
      inner_batch: None, or what ``inner`` takes third. One batch, one noise
        key for the whole call, whatever the solver.
      outer_batch: the same of ``outer``.
      key: of the random starts; a fresh one every call.
      spectrum: bounds of an earlier call of :meth:`spectral_bounds`, which are
        then not computed.
      bounds_age: how many outer steps ago that was.

    Raises:
      ValueError: naming the argument that is wrong.
    """
    problem = engine.pose(
      self.inner, self.outer, theta, phi, inner_batch, outer_batch
    )
    age = jnp.asarray(bounds_age, jnp.int32)
    with jax.default_matmul_precision("highest"):
      return engine.evaluate(self, problem, key, spectrum, age)


def hypergradient(
  inner: Callable,
  outer: Callable,
  *,
  solver: Any = DEFAULT,
  operator: Any = DEFAULT,
  bounds: Any = DEFAULT,
  acceptance: Any = DEFAULT,
  on_reject: str = "zero",
  correction: bool = False,
  max_explicit: int = 16,
  fidelity: str = "default",
) -> Hypergradient:
  r"""The gradient of ``outer`` in phi through the minimum of ``inner``.

  .. math:: \hat g = d - B^T x, \qquad x \approx A^{-1} v

  with :math:`v, d` the gradients of outer in theta and phi, :math:`B =
  \partial^2_{\theta\phi} inner` and A what ``operator`` makes of the Hessian of
  inner. Training is not unrolled; the memory is that of one gradient and a few
  copies of theta, whatever the number of terms.

  Formal guarantees, where ``info.certified``:

  - :math:`\|\hat g - g_A\| \le E = \|B\| \|v - Ax\| / \mu` with :math:`g_A = d
    - B^T A^{-1} v`, with probability ``1 - info.failure_probability`` over the
    random starts and in exact arithmetic.
  - Accepted means :math:`E \le \rho \|\hat g\|`, so that :math:`\langle\hat g,
    g_A\rangle \ge (1 - \rho) \|\hat g\|^2`.
  - Where ``info.sign_certified``, the coordinate has the sign of :math:`g_A`.

  What is *not* covered: that A is the right operator (the damping biases, see
  :func:`damped`; ``published`` is another thing altogether), that theta is a
  minimum (see ``info.inner_gradient_norm``; decoupled weight decay belongs into
  inner), mini-batches, kinks of ReLU, ``stop_gradient`` inside of inner,
  rounding. It certifies the truncation of a linear solve, not the system.

  Leaves of bfloat16 are raised to float32, batches too; float64 stays. The
  gradient has the dtypes of phi. With ``v = 0`` it is d, accepted. What is not
  finite gives zeros, not accepted.

  >>> inner = lambda theta, phi: 0.5 * ((theta - phi) ** 2).sum()
  >>> outer = lambda theta, phi: (theta**2).sum()
  >>> gradient = jax.jit(hypergradient(inner, outer, operator=ift()))
  >>> theta = phi = jnp.array([1.0, -2.0])
  >>> found, info = gradient(theta, phi, key=jax.random.key(0))
  >>> found.round(3).tolist(), bool(info.accepted)
  ([2.0, -4.0], True)

  Args:
    inner: ``inner(theta, phi) -> scalar``, or ``inner(theta, phi, batch)``.
    outer: the same.
    solver: by default ``conjugate_gradient(10)``.
    operator: by default ``damped(ratio=0.05)``.
    bounds: by default ``lanczos_bounds(20, failure_probability=1e-3)``; None:
      nothing is known, nothing certified and nothing refused.
    acceptance: rho, by default 0.5; None accepts whatever is finite.
    on_reject: ``"zero"`` returns zeros for what is not accepted, ``"keep"`` the
      gradient as it is.
    correction: replaces :math:`b_j^T x` by :math:`b_j^T x + y_j^T (v - A x)`
      with :math:`y_j \approx A^{-1} b_j`, at one solve more for each scalar of
      phi; the error is then quadratic in the residuals.
    max_explicit: up to that many scalars of phi the columns of B are computed
      one by one; beyond, ``||B||`` is bounded by Lanczos iteration and serves
      for every column, so that signs are certified less often.
    fidelity: ``"published"``: ``published(0.9)``, ``neumann(10)`` where not
      given and no skip rule.

  Returns:
    ``fn(theta, phi, inner_batch=None, outer_batch=None, *, key) ->
    (gradient, HypergradientInfo)``, see :class:`Hypergradient`. Jit, vmap over
    phi (with a solver without ``max_steps``) and sharded parameters are fine.

  Raises:
    ValueError: naming the argument that is wrong.

  References:
    `Lorraine et al. (2020) <https://arxiv.org/abs/1911.02590>`_;
    `Grazzi et al. (2020) <https://arxiv.org/abs/2006.16218>`_;
    `Fu et al. (2026) <https://arxiv.org/abs/2602.16197>`_, the published form.
  """
  _validate.one_of(("default", "published"), fidelity=fidelity)
  _validate.one_of(("zero", "keep"), on_reject=on_reject)
  _validate.at_least(1, max_explicit=max_explicit)
  solver, operator, bounds = values(solver, operator, bounds, fidelity)
  if acceptance is DEFAULT:
    acceptance = None if fidelity == "published" or bounds is None else 0.5
  if acceptance is not None:
    _validate.positive(acceptance=acceptance)
    if bounds is None:
      raise ValueError("acceptance must be None without bounds.")
  return Hypergradient(
    inner=inner,
    outer=outer,
    solver=solver,
    operator=operator,
    bounds=bounds,
    acceptance=acceptance,
    on_reject=on_reject,
    correction=correction,
    max_explicit=max_explicit,
  )


def values(
  solver: Any, operator: Any, bounds: Any, fidelity: str = "default"
) -> tuple[Callable, Callable, Callable | None]:
  """Solver, operator and bounds with the defaults filled in, checked."""
  published = fidelity == "published"
  if solver is DEFAULT:
    solver = (
      solvers.neumann(10) if published else solvers.conjugate_gradient(10)
    )
  if operator is DEFAULT:
    operator = operators.published() if published else operators.damped()
  if bounds is DEFAULT:
    bounds = bounds_lib.lanczos_bounds()
  for name, value in (("solver", solver), ("operator", operator)):
    if not callable(value):
      raise ValueError(f"{name} must be a value of hypergrad, got {value!r}.")
    if bounds is None and getattr(value, "needs_bounds", False):
      raise ValueError(f"bounds must not be None: the {name} needs them.")
  return solver, operator, bounds
