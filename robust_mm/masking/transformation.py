"""The optax transformation that gates a destructive gradient."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax

from robust_mm import _convolutions
from robust_mm import _validate
from robust_mm.linalg import trees
from robust_mm.masking import blocks as blocks_lib
from robust_mm.masking import gates as gates_lib
from robust_mm.masking import measures
from robust_mm.masking import policies
from robust_mm.masking import state as state_lib

_FIDELITIES = ("default", "published")
_SEPARABLE = (False, True, "check")


def curvature_mask(
  inner: optax.GradientTransformation,
  labels: Any,
  *,
  gate: Any = None,
  gated: Collection[str] | None = None,
  period: int | None = None,
  policy: str | None = None,
  destructive_optimizer: optax.GradientTransformation | None = None,
  destructive_clip: float | None = 1.0,
  separable: bool | str = False,
  seed: int = 0,
  fidelity: str = "default",
  name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""An optimiser that takes a destructive gradient where curvature allows it.

  With the ordinary gradient g, the destructive one q, the gate :math:`c_j` of
  every block (and the element mask M of a Fisher mask in its place),

  ============  ============================================================
  policy        updates
  ============  ============================================================
  "mask"        ``inner(g + c q)``: the task may repair a closed block. What q
                has left in the momentum of ``inner`` goes on moving it.
  "separate"    ``inner(g) + destructive_optimizer(c q)``: in a closed block the
                destructive motion stops at once, its state is held. The
                optimiser must not normalise (SGD): with Adam the size of q
                cancels, and no one can detect that here.
  "freeze"      ``inner(g + q)`` by block; a closed block has zero updates and
                its state rests, task included.
  ============  ============================================================

  q is clipped to ``destructive_clip`` by block before all that. ``update``
  is called as ``update(g, state, params, destructive=q, value_fn=J,
  fisher_batch=batch)``; everything else is forwarded to ``inner``.

  - ``destructive``: like g, zero in blocks that are not attacked. None for no
    attack: under "mask" and "separate" exactly ``inner``, nothing measured.
  - ``value_fn``: ``params -> scalar``, the destructive loss whose curvature
    counts: batch, noise and dropout keys fixed. Needed by Hessian and
    directional gates with every ``destructive``.
  - ``fisher_batch``: task examples for ``fisher_mask``.

  Formal guarantees:
    - One trace for any pattern of gates; between refreshes gates are cached.
    - A block with ``c = 0`` gets no value of q, NaN included: it is selected,
      not multiplied. A q that is not finite (or longer than about 1e19) is left
      out of its block for that update, and counted.
    - With all gates open "mask" is ``inner(g + q)`` bit for bit (q unclipped),
      with all closed ``inner(g)``.
    - Updates have the dtypes of g; gates measure in float32 at least.
    - Resuming from a saved state gives the same gates.

  Cost of a refresh in gradients of ``value_fn`` in the gated blocks: 1 + 1.9 *
  ``num_steps`` (Hessian), 2.9 (directional). Under ``vmap`` the condition
  becomes a selection, and every update pays for a refresh.

  Order: clip g before, schedules after: ``chain(clip, curvature_mask(
  scale_by_adam(), ...), scale_by_schedule)``. A counter inside a held ``inner``
  stands still, and under "freeze" a norm inside ``inner`` is that of a block.
  For several destructive terms nest one mask around another, each with a
  ``name`` ("freeze" only innermost).

  >>> tx = curvature_mask(optax.sgd(0.1), {"a": "a"}, gate=hessian_gate())
  >>> params = {"a": jnp.ones(2)}
  >>> updates, state = tx.update(
  ...   {"a": jnp.zeros(2)}, tx.init(params), params,
  ...   destructive={"a": jnp.full(2, 0.5)},
  ...   value_fn=lambda params: -jnp.sum(params["a"] ** 2),
  ... )
  >>> updates["a"].tolist(), bool(state.gates["a"])   # concave: closed
  ([-0.0, -0.0], False)

  Args:
    inner: any optax transformation.
    labels: pytree of str like the parameters, the block of every leaf; or a
      function of the parameters that gives one. ``"rest"`` is for what is not
      attacked.
    gate: a gate of this module; ``hessian_gate()`` by default.
    gated: labels that may close; all but ``"rest"`` by default.
    period: updates between refreshes; by default 200 for ``hessian_gate`` and
      ``random_gate``, 20 for the others.
    policy: ``"mask"`` by default; ``"freeze"`` knows no element mask.
    destructive_optimizer: for ``"separate"``.
    destructive_clip: l2 norm of q by block at most; None for any.
    separable: ``value_fn`` is a sum of terms of one block each: all blocks then
      share one loop of products. Wrong silently if it is not so; ``"check"``
      refuses that at run time, one more product a block and refresh.
    seed: of the start vectors of Lanczos.
    fidelity: ``"published"`` takes gate and policy from the publication: never
      closed, "freeze".
    name: with one, the arguments are ``{name}_destructive``,
      ``{name}_value_fn`` and ``{name}_fisher_batch``.

  Returns:
    A transformation; its state is a :class:`CurvatureMaskState`.

  Raises:
    ValueError: a bad value, naming the argument; at ``init`` also labels of
      another structure, integer leaves in a gated block and ``num_steps`` too
      few for a block; at ``update`` a missing argument or a ``destructive`` of
      another shape.
  """
  gate, policy = _resolve(gate, policy, fidelity)
  _check(gate, policy, destructive_optimizer, destructive_clip, separable)
  period = gate.period if period is None else period
  _validate.at_least(1, period=period)
  mask = _Mask(
    inner=policies.dtype_kept(inner),
    destructive=policies.dtype_kept(destructive_optimizer or optax.identity()),
    labels=labels,
    gated=gated,
    gate=gate,
    period=int(period),
    policy=policy,
    clip=destructive_clip,
    separable=separable,
    key=int(seed),
    prefix=f"{name}_" if name else "",
  )
  return optax.GradientTransformationExtraArgs(mask.init, mask.update)


class _Mask:
  """The two functions; everything here is static."""

  def __init__(self, **settings):
    self.__dict__.update(settings)
    self.measures = not isinstance(self.gate, gates_lib.PublishedGate)
    self.elementwise = isinstance(self.gate, gates_lib.FisherMask)
    self.last_labels = {}

  def blocks(self, params):
    labels = self.labels
    if callable(labels):
      # optax.tree.map_params initialises with a tree without leaves, of which
      # no function of parameters can make anything: the last labels then.
      if jax.tree.leaves(params):
        self.last_labels = labels(params)
      labels = self.last_labels
    return blocks_lib.Blocks(params, labels, self.gated)

  def init(self, params):
    blocks = self.blocks(params)
    if isinstance(self.gate, gates_lib.HessianGate):
      for leaves in blocks.take(params, blocks.gated).values():
        if leaves:
          measures.block_share(self.gate, leaves)
    fisher = None
    if self.elementwise:
      fisher = jax.tree.map(lambda a: jnp.zeros_like(a, jnp.float32), params)
    start = measures.initial(self.gate, blocks.gated, fisher)
    return state_lib.CurvatureMaskState(
      count=jnp.zeros((), jnp.int32),
      key=jax.random.key(self.key),
      gates=start.gates,
      verdicts=start.verdicts,
      evidence=start.evidence,
      closed_count={n: jnp.zeros((), jnp.int32) for n in blocks.gated},
      nonfinite_count={n: jnp.zeros((), jnp.int32) for n in blocks.names},
      fisher=fisher,
      inner_state=self._init_inner(blocks, params),
    )

  def update(self, updates, state, params=None, **extra):
    if params is None:
      raise ValueError("curvature_mask needs params in update().")
    blocks = self.blocks(params)
    q, value_fn, fisher_batch = (
      extra.pop(self.prefix + key, None)
      for key in ("destructive", "value_fn", "fisher_batch")
    )
    if q is not None:
      blocks.check_like(q, updates)
    problem = measures.Problem(
      blocks, params, q, value_fn, fisher_batch, self.separable
    )
    measured, failed = self._refreshed(problem, state)
    spoiled = {}
    if q is not None:
      q, spoiled = self._masked(blocks, q, measured)
    updates, inner_state = self._combine(
      blocks, updates, q, measured, spoiled, state.inner_state, params, extra
    )
    nothing = jnp.zeros((), bool)
    count = optax.safe_increment
    return updates, state_lib.CurvatureMaskState(
      count=count(state.count),
      key=state.key,
      gates=measured.gates,
      verdicts=measured.verdicts,
      evidence=measured.evidence,
      closed_count={
        name: jnp.where(measured.gates[name], n, count(n))
        for name, n in state.closed_count.items()
      },
      nonfinite_count={
        name: jnp.where(
          spoiled.get(name, nothing) | failed.get(name, nothing), count(n), n
        )
        for name, n in state.nonfinite_count.items()
      },
      fisher=measured.fisher,
      inner_state=inner_state,
    )

  def _refreshed(self, problem, state):
    """What the gates say now, and which blocks failed to be measured."""
    cached = measures.Measured(
      gates=state.gates,
      verdicts=state.verdicts,
      evidence=state.evidence,
      failed={name: jnp.zeros((), bool) for name in state.gates},
      fisher=state.fisher,
    )
    if not self.measures or not state.gates:
      return cached, {}
    if problem.destructive is None and not self._measures_without(problem):
      return cached, {}
    measures.check(self.gate, problem)
    key = jax.random.fold_in(state.key, state.count)
    measured = jax.lax.cond(
      state.count % self.period == 0,
      lambda: _convolutions.canonical(
        lambda: measures.measure(self.gate, problem, cached, key)
      ),
      lambda: cached,
    )
    return measured, measured.failed

  def _measures_without(self, problem):
    # A frozen block is frozen whether or not it is being attacked.
    return (
      self.policy == "freeze"
      and isinstance(self.gate, gates_lib.HessianGate)
      and problem.value_fn is not None
    )

  def _masked(self, blocks, q, measured):
    """q clipped, and selected where the gates are open; spoiled blocks."""
    sizes = {
      name: blocks_lib.quick_length(leaves)
      for name, leaves in blocks.take(q, blocks.names).items()
    }
    spoiled = {name: ~jnp.isfinite(size) for name, size in sizes.items()}
    factors = {name: self._factor(size) for name, size in sizes.items()}

    def select(label, leaf, *fisher):
      scaled = leaf.astype(trees.solve_dtype(leaf)) * factors[label]
      passes = ~spoiled[label]
      if label in measured.gates and self.policy != "freeze":
        passes &= measured.gates[label]
        if fisher:
          passes &= fisher[0] <= measured.evidence[label]["threshold"]
      # x + (-0.0) is x for every x; -0.0 + 0.0 is not -0.0.
      return jnp.where(passes, scaled, -0.0).astype(leaf.dtype)

    fisher = [measured.fisher] if self.elementwise else []
    return blocks.map(select, q, *fisher), spoiled

  def _factor(self, size):
    if self.clip is None:
      return jnp.ones_like(size)
    # Exactly 1 below the clip, so that nothing is rounded.
    return jnp.where(size > self.clip, self.clip / size, 1)

  def _init_inner(self, blocks, params):
    if self.policy == "separate":
      return policies.Separate(
        self.inner.init(params), self._held(blocks).init(params)
      )
    if self.policy == "freeze" and self.measures:
      return self._held(blocks).init(params)
    return self.inner.init(params)

  def _held(self, blocks):
    """The optimiser of the destructive part, or of all, block by block."""
    tx = self.destructive if self.policy == "separate" else self.inner
    return policies.gated_by_block(tx, blocks.labels, blocks.gated)

  def _combine(
    self, blocks, updates, q, measured, spoiled, inner_state, params, extra
  ):
    if self.policy == "separate":
      after, inner = self.inner.update(
        updates, inner_state.inner, params, **extra
      )
      if q is None:
        return after, inner_state._replace(inner=inner)
      gates = {n: c & ~spoiled[n] for n, c in measured.gates.items()}
      moved, destructive = self._held(blocks).update(
        _cast(q, updates),
        inner_state.destructive,
        params,
        **{**extra, "gates": gates},
      )
      if self.elementwise:
        moved = _within(blocks, moved, measured)
      total = jax.tree.map(jnp.add, after, moved)
      return total, policies.Separate(inner, destructive)
    if q is not None:
      updates = jax.tree.map(jnp.add, updates, _cast(q, updates))
    if self.policy == "freeze" and self.measures:
      return self._held(blocks).update(
        updates, inner_state, params, **{**extra, "gates": measured.gates}
      )
    return self.inner.update(updates, inner_state, params, **extra)


def _within(blocks, moved, measured):
  """A step inside the element mask: momentum of q must not leave it."""

  def select(label, leaf, fisher):
    if label not in measured.gates:
      return leaf
    inside = fisher <= measured.evidence[label]["threshold"]
    return jnp.where(inside, leaf, jnp.zeros_like(leaf))

  return blocks.map(select, moved, measured.fisher)


def _cast(q, updates):
  return jax.tree.map(lambda a, g: a.astype(g.dtype), q, updates)


def _resolve(gate, policy, fidelity):
  _validate.one_of(_FIDELITIES, fidelity=fidelity)
  if fidelity == "default":
    return gate or gates_lib.hessian_gate(), policy or "mask"
  published = gates_lib.PublishedGate
  if not isinstance(gate, published | None) or policy not in (None, "freeze"):
    raise ValueError(
      "gate and policy must be left out where fidelity is 'published'."
    )
  return gate or gates_lib.published_gate(), "freeze"


def _check(gate, policy, destructive_optimizer, destructive_clip, separable):
  if not isinstance(gate, gates_lib.Gate):
    raise ValueError(f"gate must be a gate of robust_mm.masking, got {gate!r}.")
  _validate.one_of(policies.POLICIES, policy=policy)
  _validate.one_of(_SEPARABLE, separable=separable)
  if destructive_clip is not None:
    _validate.positive(destructive_clip=destructive_clip)
  if policy == "separate" and destructive_optimizer is None:
    raise ValueError(
      "destructive_optimizer must be given for policy='separate'."
    )
  if policy != "separate" and destructive_optimizer is not None:
    raise ValueError("destructive_optimizer is for policy='separate' alone.")
  if policy == "freeze" and isinstance(gate, gates_lib.FisherMask):
    raise ValueError(
      "policy must be 'mask' or 'separate' for fisher_mask: it masks elements, "
      "and no block is ever closed."
    )
