"""What is affine, what is an activation, and how magnitudes pass through."""

import dataclasses
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

# One operand may depend on the inputs, the others are constants: linear in it.
_BILINEAR = {"mul", "dot_general", "conv_general_dilated"}
# Linear in all operands together.
_LINEAR = {
  "add",
  "add_any",
  "broadcast_in_dim",
  "concatenate",
  "convert_element_type",
  "copy",
  "cumsum",
  "expand_dims",
  "neg",
  "pad",
  "reduce_sum",
  "reduce_window_sum",
  "reshape",
  "rev",
  "slice",
  "split",
  "squeeze",
  "sub",
  "transpose",
}
# Linear in the first operand; the others say where, or by how much.
_INDEXED = {"div", "dynamic_slice", "gather"}
_COMPARISONS = {"ge": 1, "gt": 1, "le": -1, "lt": -1}
_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")
_INLINED = {
  "closed_call",
  "core_call",
  "custom_jvp_call",
  "custom_vjp_call",
  "custom_vjp_call_jaxpr",
  "jit",
  "pjit",
  "remat",
  "remat2",
  "checkpoint",
}
PLAIN = {
  "add": lambda a, b: [a + jnp.asarray(b, a.dtype)],
  "sub": lambda a, b: [jnp.asarray(a) - b],
  "mul": lambda a, b: [a * jnp.asarray(b, a.dtype)],
}
_SMALLEST = 4  # bytes of a floating type whose rounding the slack absorbs


@dataclasses.dataclass(frozen=True)
class Literal:
  """A constant of the program itself."""

  value: Any

  @property
  def scalar(self) -> float | None:
    """Its number, if it is one that is known."""
    if np.ndim(self.value) or not hasattr(self.value, "__float__"):
      return None
    try:
      return float(self.value)
    except TypeError:  # a tracer
      return None


@dataclasses.dataclass(frozen=True)
class Fact:
  """What is known of a variable while a program is taken apart.

  Attributes:
    kind: "constant", "input", "affine", "activation", "sign" (the boolean
      ``of >= 0``, or ``of <= 0`` with ``scale`` -1) or "scaled" (``scale *
      of``, affine as well).
    of: the variable a sign or a multiple is of.
    scale: see above.
    value: the one number a constant is filled with, where that is known.
  """

  kind: str
  of: int | None = None
  scale: float = 1.0
  value: float | None = None

  @property
  def zero(self) -> bool:
    """A constant that is 0 everywhere."""
    return self.value == 0


@dataclasses.dataclass(frozen=True)
class Equation:
  """``results = bind(*operands)`` on variables and literals."""

  bind: Callable[..., Any]
  name: str
  operands: tuple[Any, ...]
  results: tuple[int, ...]


def inner_jaxpr(equation) -> Any:
  """The body of a call that is inlined, or None."""
  if equation.primitive.name not in _INLINED:
    return None
  for key in _INNER:
    if key in equation.params:
      return equation.params[key]
  return None


def binder(equation) -> Callable[..., list]:
  """The equation as a function of its operands' values."""
  primitive, params = equation.primitive, equation.params

  def bind(*values):
    result = primitive.bind(*values, **params)
    return list(result) if primitive.multiple_results else [result]

  return bind


def activation(equation, operands, facts) -> tuple[str, tuple] | None:
  """``(kind, arguments)`` where an equation is an activation, else None."""
  name = equation.primitive.name
  if name in ("max", "min"):
    kind = "maximum" if name == "max" else "minimum"
    if kind == "maximum" and facts[1].zero:
      return "piecewise", (operands[0], (0.0, 1.0))
    if kind == "maximum" and facts[0].zero:
      return "piecewise", (operands[1], (0.0, 1.0))
    return kind, tuple(operands)
  if name == "abs":
    return "piecewise", (operands[0], (-1.0, 1.0))
  if name == "tanh":
    return "tanh", (operands[0], (0.0, 1.0))
  if name == "logistic":
    return "sigmoid", (operands[0],)
  if name == "select_n" and facts[0].kind == "sign":
    return _two_slopes(operands, facts)
  return None


def _two_slopes(operands, facts):
  """``where(x >= 0, p x, q x)``: leaky relu and its relatives."""
  base = facts[0].of
  slopes = []
  for operand, fact in zip(operands[1:], facts[1:]):
    if operand == base:
      slopes.append(1.0)
    elif fact.kind == "scaled" and fact.of == base:
      slopes.append(fact.scale)
    elif fact.kind == "constant" and fact.zero:
      slopes.append(0.0)
    else:
      _refuse("select_n", "a choice by sign of something else than multiples")
  if facts[0].scale < 0:
    slopes.reverse()
  return "piecewise", (base, tuple(slopes))


def affine(equation, operands, facts) -> Fact:
  """The fact of an affine equation's results; ValueError for any other."""
  name = equation.primitive.name
  depends = [i for i, f in enumerate(facts) if f.kind != "constant"]
  if name in _COMPARISONS and depends == [0] and facts[1].zero:
    return Fact("sign", of=operands[0], scale=_COMPARISONS[name])
  if name in _COMPARISONS and depends == [1] and facts[0].zero:
    return Fact("sign", of=operands[1], scale=-_COMPARISONS[name])
  if name in (*_COMPARISONS, "eq", "ne") or any(
    facts[i].kind == "sign" for i in depends
  ):
    _refuse(name, "a comparison")
  _check_dtype(equation)
  if name == "mul" and len(depends) == 1:
    other = facts[1 - depends[0]].value
    if other is not None:
      return Fact("scaled", of=operands[depends[0]], scale=other)
  if (
    name in _LINEAR
    or (name in _BILINEAR and len(depends) == 1)
    or (name in _INDEXED and depends == [0])
    or (name == "select_n" and 0 not in depends)
  ):
    return Fact("affine")
  _refuse(name, "it")
  return Fact("affine")


def _refuse(name, what):
  raise ValueError(
    f"no linear relaxation is known for {what} in the model ({name}); it "
    "takes affine layers with relu, leaky relu, abs, maxima, tanh or sigmoid. "
    "Use randomised smoothing, or 1-Lipschitz encoders."
  )


def _check_dtype(equation):
  for variable in equation.outvars:
    dtype = variable.aval.dtype
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < _SMALLEST:
      raise ValueError(
        f"the model computes in {dtype}, whose rounding a certificate cannot "
        "absorb; use float32."
      )


def filled_with(equation, facts) -> float | None:
  """The number a constant equation fills its result with, where known."""
  moves = ("broadcast_in_dim", "convert_element_type", "reshape", "copy")
  if equation.primitive.name in moves and facts:
    return facts[0].value
  return None


def evaluate(equation: Equation, values: dict) -> None:
  """Adds the results of an equation to ``values``."""
  operands = [_value(o, values) for o in equation.operands]
  values.update(zip(equation.results, equation.bind(*operands)))


def evaluate_absolute(
  equation: Equation, values: dict, known: frozenset
) -> None:
  """The same for radii: coefficients by magnitude, no constants added."""
  constant = [isinstance(o, Literal) or o in known for o in equation.operands]
  operands = [_value(o, values) for o in equation.operands]
  name = equation.name
  if name == "neg":
    results = [operands[0]]
  elif name == "sub":
    kept = [o for o, c in zip(operands, constant) if not c]
    results = [sum(kept[1:], kept[0])]
    results = [
      jnp.broadcast_to(
        results[0], np.broadcast_shapes(*(np.shape(o) for o in operands))
      )
    ]
  else:
    additive = name in ("add", "add_any", "concatenate", "pad", "select_n")
    skip = 1 if name == "select_n" else 0
    indices = name in ("gather", "dynamic_slice")
    operands = [
      o
      if not c or i < skip or (indices and i)
      else (jnp.zeros_like(o) if additive else jnp.abs(o))
      for i, (o, c) in enumerate(zip(operands, constant))
    ]
    results = equation.bind(*operands)
  values.update(zip(equation.results, results))


def _value(operand, values: Mapping[int, Any]):
  return operand.value if isinstance(operand, Literal) else values[operand]
