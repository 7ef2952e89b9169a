"""A function taken apart: affine pieces between elementwise activations.

Any jax function made of affine operations and known activations becomes a
directed graph whose nodes are the activations. Between them everything is
affine, so values, transposes and constants all come from evaluating pieces of
the traced program; nothing has to be said twice about layers, strides or
paddings, and a plain function works as well as a flax module.
"""

import dataclasses
import functools
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from robust_mm.relaxation import lines
from robust_mm.relaxation import rules


@dataclasses.dataclass(frozen=True, kw_only=True)
class Node:
  """One elementwise activation.

  Attributes:
    kind: "piecewise" (slope ``slopes[0]`` below 0, ``slopes[1]`` above) or
      "tanh".
    slopes: of a piecewise linear one.
    source: the variable it reads.
    result: the variable it makes.
    shape: of both.
  """

  kind: str
  slopes: tuple[float, float]
  source: int
  result: int
  shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
  """What an activation, or the output, reads: affine in its parents.

  Attributes:
    target: the variable.
    equations: to evaluate, in order.
    inputs: names of the inputs it reads directly.
    parents: positions of the nodes it reads directly.
  """

  target: int
  equations: tuple[int, ...]
  inputs: tuple[str, ...]
  parents: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Network:
  """The graph of ``fn(constants, inputs) -> output`` for one example.

  Attributes:
    equations: the flat program.
    constant_equations: positions of those that read no input.
    constant_ids: variables of the flat constants.
    input_ids: ``{name: variable}``.
    input_shapes: ``{name: shape}``.
    nodes: the activations, each after those it depends on.
    pieces: of each node, then of the output.
    output_shape: of the output.
  """

  equations: tuple[rules.Equation, ...]
  constant_equations: tuple[int, ...]
  constant_ids: tuple[int, ...]
  input_ids: Mapping[str, int]
  input_shapes: Mapping[str, tuple[int, ...]]
  nodes: tuple[Node, ...]
  pieces: tuple[Piece, ...]
  output_shape: tuple[int, ...]

  def bind(self, constants: Any) -> "BoundNetwork":
    """The network with values of its constants, traced or not."""
    values = dict(zip(self.constant_ids, jax.tree.leaves(constants)))
    for index in self.constant_equations:
      rules.evaluate(self.equations[index], values)
    return BoundNetwork(network=self, constants=values)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class BoundNetwork:
  """A network whose constants have values; lives inside one trace."""

  network: Network
  constants: Mapping[int, Any]

  def shape(self, name: str) -> tuple[int, ...]:
    """Of the input called ``name``."""
    return self.network.input_shapes[name]

  def __call__(self, inputs: Mapping[str, Any]) -> Any:
    """The output at one example: the function that was traced."""
    activations = []
    for position, node in enumerate(self.network.nodes):
      read = self.piece(position)(inputs, activations)
      activations.append(lines.value(node.kind, node.slopes, read))
    return self.piece(len(activations))(inputs, activations)

  def piece(self, position: int, *, absolute: bool = False) -> Callable:
    """``piece(inputs, activations) -> value`` of node ``position``.

    ``position = len(nodes)`` is the output. With ``absolute`` the linear part
    with all coefficients replaced by their magnitudes, without constants: what
    a box radius becomes. (Paths that cancel add up there: still a bound.)
    """
    network = self.network
    piece = network.pieces[position]

    def run(inputs, activations):
      values = dict(self.constants)
      for name in piece.inputs:
        values[network.input_ids[name]] = inputs[name]
      for parent in piece.parents:
        values[network.nodes[parent].result] = activations[parent]
      known = frozenset(self.constants)
      for index in piece.equations:
        equation = network.equations[index]
        if absolute:
          rules.evaluate_absolute(equation, values, known)
        else:
          rules.evaluate(equation, values)
      value = values[piece.target]
      if piece.target in known and absolute:
        return jnp.zeros_like(value)
      return value

    return run


def trace(
  fn: Callable[[Any, Mapping[str, Any]], Any],
  constants: Any,
  inputs: Mapping[str, Any],
) -> Network:
  """The network of ``fn`` at these shapes.

  Args:
    fn: ``fn(constants, inputs) -> array``, for one example; affine between
      relu, leaky relu, abs, maxima and minima of two arrays, tanh, sigmoid.
    constants: pytree of arrays (parameters, presence), values or shapes.
    inputs: ``{name: array}`` of one example, values or shapes.

  Raises:
    ValueError: naming the first operation there is no rule for.
  """
  names = tuple(sorted(inputs))
  with jax.default_matmul_precision("highest"):
    closed, shape = jax.make_jaxpr(
      lambda c, x: fn(c, dict(zip(names, x))), return_shape=True
    )(constants, [inputs[name] for name in names])
  return _Builder(closed, len(names), names, tuple(shape.shape)).build()


class _Builder:
  """Walks a closed jaxpr once, inlining calls, into a flat program."""

  def __init__(self, closed, num_inputs, names, output_shape):
    self.equations, self.constant_equations = [], []
    self.nodes = []
    self.facts = {}  # variable -> what is known of it, see rules
    self._shapes = {}
    self.output_shape = output_shape
    self.names = names
    jaxpr = closed.jaxpr
    scope = {}
    for variable, value in zip(jaxpr.constvars, closed.consts):
      scope[variable] = self._literal(value)
    fresh = [self._new(v.aval.shape) for v in jaxpr.invars]
    split = len(fresh) - num_inputs
    self.constant_ids = tuple(fresh[:split])
    self.input_ids = dict(zip(names, fresh[split:]))
    for identity in self.input_ids.values():
      self.facts[identity] = rules.Fact("input")
    scope.update(zip(jaxpr.invars, fresh))
    (self.output,) = self._inline(jaxpr, scope)

  def build(self) -> Network:
    targets = [node.source for node in self.nodes] + [self.output]
    return Network(
      equations=tuple(self.equations),
      constant_equations=tuple(self.constant_equations),
      constant_ids=self.constant_ids,
      input_ids=self.input_ids,
      input_shapes={
        name: self._shapes[i] for name, i in self.input_ids.items()
      },
      nodes=tuple(self.nodes),
      pieces=tuple(self._piece(target) for target in targets),
      output_shape=self.output_shape,
    )

  @functools.cached_property
  def _made_by(self):
    return {
      result: index
      for index, equation in enumerate(self.equations)
      for result in equation.results
    }

  def _piece(self, target) -> Piece:
    """The slice of the program back to inputs, constants and activations."""
    by_input = {i: name for name, i in self.input_ids.items()}
    by_node = {node.result: i for i, node in enumerate(self.nodes)}
    constant = set(self.constant_equations)
    needed, inputs, parents = set(), set(), set()
    pending, seen = [target], set()
    while pending:
      variable = pending.pop()
      if variable in seen:
        continue
      seen.add(variable)
      if variable in by_input:
        inputs.add(by_input[variable])
      elif variable in by_node:
        parents.add(by_node[variable])
      elif variable in self._made_by:
        index = self._made_by[variable]
        if index not in constant:
          needed.add(index)
          operands = self.equations[index].operands
          pending += [o for o in operands if isinstance(o, int)]
    return Piece(
      target=target,
      equations=tuple(sorted(needed)),
      inputs=tuple(sorted(inputs)),
      parents=tuple(sorted(parents)),
    )

  def _new(self, shape, fact=None) -> int:
    identity = len(self.facts)
    self.facts[identity] = fact or rules.Fact("constant")
    self._shapes[identity] = tuple(shape)
    return identity

  def _literal(self, value):
    return rules.Literal(value)

  def _inline(self, jaxpr, scope) -> list:
    for equation in jaxpr.eqns:
      operands = [self._read(v, scope) for v in equation.invars]
      inner = rules.inner_jaxpr(equation)
      if inner is None:
        results = self._add(equation, operands)
      else:
        body = getattr(inner, "jaxpr", inner)
        inside = dict(
          zip(body.constvars, map(self._literal, getattr(inner, "consts", ())))
        )
        inside.update(zip(body.invars, operands[-len(body.invars) :]))
        results = self._inline(body, inside)
      scope.update(zip(equation.outvars, results))
    return [self._read(v, scope) for v in jaxpr.outvars]

  def _read(self, variable, scope):
    if isinstance(variable, core.Literal):
      return self._literal(variable.val)
    return scope[variable]

  def _fact(self, operand):
    if isinstance(operand, rules.Literal):
      return rules.Fact("constant", value=operand.scalar)
    return self.facts[operand]

  def _add(self, equation, operands) -> list:
    """One equation: constant, affine, or an activation."""
    facts = [self._fact(o) for o in operands]
    if all(f.kind == "constant" for f in facts):
      return self._emit(equation, operands, constant=True)
    found = rules.activation(equation, operands, facts)
    if found is not None:
      return [self._activate(*found, equation)]
    fact = rules.affine(equation, operands, facts)
    return self._emit(equation, operands, fact=fact)

  def _emit(self, equation, operands, *, constant=False, fact=None) -> list:
    if constant:
      facts = [self._fact(o) for o in operands]
      value = rules.filled_with(equation, facts)
      fact = rules.Fact("constant", value=value)
    results = []
    for variable in equation.outvars:
      results.append(self._new(variable.aval.shape, fact))
    if constant:
      self.constant_equations.append(len(self.equations))
    self.equations.append(
      rules.Equation(
        bind=rules.binder(equation),
        name=equation.primitive.name,
        operands=tuple(operands),
        results=tuple(results),
      )
    )
    return results

  def _plain(self, name, operands, shape) -> int:
    """An equation of our own making, affine."""
    constant = all(self._fact(o).kind == "constant" for o in operands)
    result = self._new(shape, None if constant else rules.Fact("affine"))
    if constant:
      self.constant_equations.append(len(self.equations))
    self.equations.append(
      rules.Equation(
        bind=rules.PLAIN[name],
        name=name,
        operands=tuple(operands),
        results=(result,),
      )
    )
    return result

  def _activate(self, kind, arguments, equation) -> Any:
    shape = tuple(equation.outvars[0].aval.shape)
    if kind in ("maximum", "minimum"):
      first, second = arguments
      gap = self._plain("sub", (first, second), shape)
      gained = self._node("piecewise", (0.0, 1.0), gap, shape)
      if kind == "maximum":
        return self._plain("add", (second, gained), shape)
      return self._plain("sub", (first, gained), shape)
    if kind == "sigmoid":
      half = rules.Literal(np.asarray(0.5, np.float32))
      inside = self._plain("mul", (arguments[0], half), shape)
      curve = self._node("tanh", (0.0, 1.0), inside, shape)
      scaled = self._plain("mul", (curve, half), shape)
      return self._plain("add", (scaled, half), shape)
    source, slopes = arguments
    return self._node(kind, slopes, source, shape)

  def _node(self, kind, slopes, source, shape) -> int:
    result = self._new(shape, rules.Fact("activation"))
    self.nodes.append(
      Node(kind=kind, slopes=slopes, source=source, result=result, shape=shape)
    )
    return result
