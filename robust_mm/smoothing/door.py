"""The front door: ``certify`` a model or any function by smoothing."""

import dataclasses
import itertools
from collections.abc import Callable
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from robust_mm import _validate
from robust_mm import modalities
from robust_mm._types import Batch
from robust_mm._types import Model
from robust_mm._types import Params
from robust_mm._types import State
from robust_mm.smoothing import bounds
from robust_mm.smoothing import certificates
from robust_mm.smoothing import noise as noise_lib
from robust_mm.smoothing import sampling
from robust_mm.smoothing import votes as votes_lib


@dataclasses.dataclass(frozen=True)
class _Logits:
  """Equal for one model, so that jit knows it again."""

  model: Model

  def __call__(self, params, state, inputs, present):
    return self.model.apply(params, state, inputs, present)[0].logits


def predict_fn(model: Model, params: Params, state: State = None) -> Callable:
  """``predict_fn(inputs, present) -> logits`` of a model, a pytree.

  Parameters are leaves and not constants: other parameters do not compile
  anew.
  """
  state = {} if state is None else state
  return jax.tree_util.Partial(_Logits(model), params, state)


def certify(
  predict: Model | Callable,
  batch: Batch,
  noise: noise_lib.Noise | noise_lib.Votes,
  key: PRNGKeyArray,
  *,
  params: Params = None,
  state: State = None,
  num_selection: int = 100,
  num_estimation: int = 10_000,
  alpha: float = 1e-3,
  units: Mapping[str, float] | None = None,
  chunk_size: int = sampling.CHUNK_SIZE,
) -> certificates.SmoothedCertificate | votes_lib.VoteCertificate:
  r"""How far an input may move before the smoothed class can change.

  ``num_selection`` noisy copies choose the class, ``num_estimation`` fresh ones
  count it; :math:`\underline p` is its Clopper-Pearson bound, and

  .. math:: R = \Phi^{-1}(\underline p)

  in units of the noise, or the combinatorial bounds of sub-sampling. At most
  R = 2.46, 3.20, 3.81 for 1e3, 1e4, 1e5 copies at alpha = 1e-3.

  Formal guarantees: see the certificates.

  Counts depend on ``key``, ``batch["id"]`` and ``chunk_size`` only, not on how
  examples are batched or sharded. Not for use inside jit: the quantiles are
  taken on the host. Examples are visited one after the other; long jobs spread
  ``count_classes`` over devices by ``jax.shard_map``, add up its counts and
  call ``from_counts``, as ``robust-mm certify --source=smoothing`` does.

  The base classifier is ``predict`` as computed, at the precision in force.

  Args:
    predict: a model, with ``params`` and ``state``; or any function
      ``predict(inputs {m: [s, ...]}, present {m: bool[s]}) -> logits [s, k]``
      that jax can trace, a ``jax.tree_util.Partial`` if it holds parameters.
      Absent inputs are zeros; what dropped elements hold is the noise's to say.
    batch: ``inputs`` and perhaps ``present`` and ``id``, by default the row
      numbers.
    noise: from ``gaussian``, ``subsample``, ``mixed`` or ``modality_votes``.
    key: of the noise; ``modality_votes`` draw none.
    params: of a model.
    state: of a model.
    num_selection: at least 1; nothing for votes, as the next two.
    num_estimation: at least 1.
    alpha: chance for each example that its certificate is wrong, in (0, 1).
    units: ``{m: s_m}``, the raw size that counts as 1 in budgets and radii.
      ``sigma`` is always raw.
    chunk_size: copies of one example in a forward pass.

  Raises:
    ValueError: naming the argument, modality or array that is wrong.
  """
  _validate.at_least(
    1,
    num_selection=num_selection,
    num_estimation=num_estimation,
    chunk_size=chunk_size,
  )
  bounds.check_alpha(alpha)
  inputs, present, number = _arrays(batch, predict)
  if isinstance(predict, Model):
    predict.need_classes("smoothing.certify")
    if params is None:
      raise ValueError("params is missing: a model needs its parameters.")
    predict = predict_fn(predict, params, state)
  elif not isinstance(predict, jax.tree_util.Partial):
    predict = jax.tree_util.Partial(predict)
  if isinstance(noise, noise_lib.Votes):
    return _vote(predict, inputs, present, noise)
  noise_lib.check(noise, inputs)
  _check_key(key)
  shapes = {name: value.shape[1:] for name, value in inputs.items()}
  units = certificates.check_units(units, tuple(inputs))
  counts = []
  for stream, size in zip(
    sampling.streams(key), (num_selection, num_estimation)
  ):
    chunk = min(chunk_size, size)
    found = sampling.count_classes(
      predict,
      inputs,
      present,
      number,
      stream,
      0,
      size,
      noise=noise,
      num_chunks=-(-size // chunk),
      chunk_size=chunk,
    )
    counts.append(np.asarray(found))
  return certificates.from_counts(
    *counts,
    noise=noise,
    present=present,
    shapes=shapes,
    num_estimation=num_estimation,
    alpha=alpha,
    units=units,
  )


def _check_key(key) -> None:
  dtype = getattr(key, "dtype", None)
  typed = dtype is not None and jax.dtypes.issubdtype(
    dtype, jax.dtypes.prng_key
  )
  # A few numbers are a key of the old kind.
  if not typed and not (dtype == np.uint32 and key.ndim == 1):
    raise ValueError(f"key must be one such as jax.random.key(0), got {key!r}.")


def _arrays(batch, predict):
  """Inputs, presence and ids of the modalities of the model or batch."""
  _validate.batch(batch)
  known = predict.modalities if isinstance(predict, Model) else batch["inputs"]
  names = modalities.names(known)
  if not names:
    raise ValueError("batch['inputs'] must have at least one modality.")
  for name in names:
    if name not in batch["inputs"]:
      raise ValueError(f"batch['inputs'] has no modality {name!r}.")
  inputs = {name: jnp.asarray(batch["inputs"][name]) for name in names}
  size = jnp.shape(inputs[names[0]])[:1]
  given = batch.get("present", {})
  present = {
    name: jnp.asarray(given[name] if name in given else jnp.ones(size, bool))
    for name in names
  }
  number = jnp.asarray(batch["id"] if "id" in batch else jnp.arange(*size))
  for name in names:
    if inputs[name].shape[:1] != size or present[name].shape != size:
      raise ValueError(
        f"batch must have one row an example of the input and of the presence "
        f"of {name!r}, got shapes {inputs[name].shape} and "
        f"{present[name].shape}."
      )
  if number.shape != size or not jnp.issubdtype(number.dtype, jnp.integer):
    raise ValueError(
      f"batch['id'] must be one integer an example, got shape {number.shape} "
      f"of {number.dtype}."
    )
  return inputs, present, number


def vote_subsets(
  noise: noise_lib.Votes, names: tuple[str, ...]
) -> tuple[tuple[str, ...], ...]:
  """All choices of ``noise.keep`` modalities."""
  if noise.keep > len(names):
    raise ValueError(
      f"keep must be at most {len(names)}, the number of modalities, got "
      f"{noise.keep}."
    )
  return tuple(itertools.combinations(modalities.names(names), noise.keep))


def _vote(predict, inputs, present, noise):
  subsets = vote_subsets(noise, tuple(inputs))
  votes = sampling.count_votes(predict, inputs, present, subsets=subsets)
  logits = jax.eval_shape(predict, inputs, present)
  return votes_lib.from_votes(
    votes,
    noise=noise,
    num_classes=logits.shape[-1],
    subsets=subsets,
    present=present,
  )
