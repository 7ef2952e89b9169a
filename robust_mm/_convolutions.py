"""Convolutions that stay fast inside a loop on a CPU.

XLA brings the layout of a convolution into the form its fast CPU kernel takes
(batch, space, feature; kernel: space, in, out) at the top level of a program
only. The gradient of a convolution in its input has another kernel layout, so
inside ``lax.scan`` or ``lax.cond`` it falls to a naive kernel, some 20 to 100
times slower:
https://github.com/jax-ml/jax/issues/12868. Here the layout is changed before
XLA sees it. On other devices that is at most a transpose of the kernel.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend import core


def canonical(fn: Callable[..., Any], *args: Any) -> Any:
  """``fn(*args)`` with every convolution in the layout fast everywhere.

  The same numbers up to the order of summation; ``fn`` may close over traced
  values, and the call may be transformed.
  """
  closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
  flat = core.jaxpr_as_fun(_rewritten(closed))(*jax.tree.leaves(args))
  return jax.tree.unflatten(jax.tree.structure(shape), flat)


def _rewritten(value):
  """The same program, or parameter of an equation, rewritten at any depth."""
  if isinstance(value, core.ClosedJaxpr) and value.jaxpr is not value:
    return value.replace(jaxpr=_rewritten(value.jaxpr))
  if isinstance(value, core.Jaxpr):  # since jax 0.11 with its constants
    return value.replace(eqns=[_rewritten_equation(e) for e in value.eqns])
  if isinstance(value, tuple) and any(
    isinstance(item, (core.ClosedJaxpr, core.Jaxpr)) for item in value
  ):
    return tuple(_rewritten(item) for item in value)
  return value


def _rewritten_equation(equation):
  if equation.primitive.name != "conv_general_dilated":
    params = {k: _rewritten(v) for k, v in equation.params.items()}
    return equation.replace(params=params)

  def convolve(inputs, kernel):
    return _convolve(inputs, kernel, **equation.params)

  # One equation that calls it, so that the variables stay as they are.
  avals = [variable.aval for variable in equation.invars]
  (call,) = jax.make_jaxpr(jax.jit(convolve))(*avals).jaxpr.eqns
  return call.replace(invars=equation.invars, outvars=equation.outvars)


def _convolve(inputs, kernel, *, dimension_numbers, **params):
  (batch, feature, *space), kernel_spec, output_spec = dimension_numbers
  outputs, kernel_inputs, *kernel_space = kernel_spec
  inputs = jax.lax.transpose(inputs, (batch, *space, feature))
  kernel = jax.lax.transpose(kernel, (*kernel_space, kernel_inputs, outputs))
  num = len(space)
  last = (0, num + 1, *range(1, num + 1))
  result = jax.lax.conv_general_dilated(
    inputs,
    kernel,
    dimension_numbers=jax.lax.ConvDimensionNumbers(
      last, (num + 1, num, *range(num)), last
    ),
    **params,
  )
  batch, feature, *space = output_spec
  return jax.lax.transpose(
    result, tuple(np.argsort((batch, *space, feature)).tolist())
  )
