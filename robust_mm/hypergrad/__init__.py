r"""Gradients of a validation loss in meta-parameters, without unrolling.

The minimum of ``inner`` in theta depends on phi; the gradient of ``outer``
through it needs one linear solve with the Hessian of inner:

.. math:: \frac{dF}{d\phi} = d - B^T H^{-1} v

Solver, operator and bounds are values, and every solve comes with a number
that bounds its error and a rule that skips bad steps:

  gradient = hypergrad.hypergradient(inner, outer,
                                     solver=hypergrad.neumann(20))
  found, info = jax.jit(gradient)(theta, phi, key=key)
  info.accepted, info.gradient_error_bound, info.inner_gradient_norm

``attach`` is for ``jax.grad`` through anything; ``outer_step`` is the outer
loop. The truncation of a linear solve is certified, not the system: see
:func:`hypergradient` for what is not covered.

Inside, each module imports only from those before it: iterations, solvers,
operators, bounds, products, certificates, engine, door, implicit, outer.
"""

from robust_mm.hypergrad.bounds import KnownBounds
from robust_mm.hypergrad.bounds import LanczosBounds
from robust_mm.hypergrad.bounds import known_bounds
from robust_mm.hypergrad.bounds import lanczos_bounds
from robust_mm.hypergrad.certificates import a_posteriori_error
from robust_mm.hypergrad.certificates import a_priori_error
from robust_mm.hypergrad.certificates import sufficient_steps
from robust_mm.hypergrad.door import Hypergradient
from robust_mm.hypergrad.door import hypergradient
from robust_mm.hypergrad.engine import HypergradientInfo
from robust_mm.hypergrad.implicit import attach
from robust_mm.hypergrad.iterations import Interval
from robust_mm.hypergrad.iterations import Solution
from robust_mm.hypergrad.operators import Damped
from robust_mm.hypergrad.operators import Published
from robust_mm.hypergrad.operators import Shifted
from robust_mm.hypergrad.operators import damped
from robust_mm.hypergrad.operators import ift
from robust_mm.hypergrad.operators import published
from robust_mm.hypergrad.outer import OuterState
from robust_mm.hypergrad.outer import OuterStep
from robust_mm.hypergrad.outer import outer_step
from robust_mm.hypergrad.products import asymmetry
from robust_mm.hypergrad.products import mixed_norm
from robust_mm.hypergrad.solvers import ConjugateGradient
from robust_mm.hypergrad.solvers import Neumann
from robust_mm.hypergrad.solvers import conjugate_gradient
from robust_mm.hypergrad.solvers import identity
from robust_mm.hypergrad.solvers import neumann
from robust_mm.linalg import spectral_bounds

__all__ = [
  "ConjugateGradient",
  "Damped",
  "Hypergradient",
  "HypergradientInfo",
  "Interval",
  "KnownBounds",
  "LanczosBounds",
  "Neumann",
  "OuterState",
  "OuterStep",
  "Published",
  "Shifted",
  "Solution",
  "a_posteriori_error",
  "a_priori_error",
  "asymmetry",
  "attach",
  "conjugate_gradient",
  "damped",
  "hypergradient",
  "identity",
  "ift",
  "known_bounds",
  "lanczos_bounds",
  "mixed_norm",
  "neumann",
  "outer_step",
  "published",
  "spectral_bounds",
  "sufficient_steps",
]
