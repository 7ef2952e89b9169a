"""Types shared by every floor: batches, model outputs, geometry, models.

Letters of the project: ``b`` batch, ``m`` modality, ``k`` class, ``d``
feature, ``t`` time, ``h w c`` image.

Fields of registered dataclasses are annotated loosely on purpose: JAX
unflattens them with leaves that are no arrays (shardings, booleans, paths).
Shapes are stated in the docstrings and checked by the functions.
"""

import dataclasses
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from robust_mm import _tasks

PyTree = Any
Params = PyTree
State = PyTree
Inputs = Mapping[str, Any]
Present = Mapping[str, Any]
Batch = Mapping[str, Any]
"""A plain dict: ``inputs`` {m: [b, ...]}, ``present`` {m: bool[b]}, ``label``
[b], or [b, k] of 0 and 1 (multi-label), and ``id`` [b].

A missing modality is ``present=False``; its input is zeros of the right shape.
"""


class Target(NamedTuple):
  """The scale of the number that a regression model predicts.

  Attributes:
    mean: of the training labels; where a fresh model begins.
    deviation: of the training labels, above 0; losses are in units of it.
  """

  mean: float
  deviation: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Outputs:
  """What a model says about a batch.

  Attributes:
    logits: ``[b, k]``; the prediction is their argmax. Of a regression model
      ``[b, 1]``: the prediction, in units of the label. Of a multi-label one
      those of a class each: above 0 it is more likely there than not.
    scores: ``{m: [b, k]}`` raw per-modality scores of a late-fusion head (the
      logits are a sum of per-modality terms), or None.
    embeddings: ``{m: [b, d_m]}``, or tokens ``{m: [b, N_m, d]}`` of a token
      transformer; zero where the modality is absent.
    mixed: True when a score depends on other modalities as well; such a model
      has no margin certificate.
  """

  logits: Any
  scores: Any
  embeddings: Any
  mixed: bool = dataclasses.field(default=False, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
  r"""What a certificate needs to know of a late-fusion model.

  The logits are :math:`\sum_m present_m V_m \phi_m(x_m) + bias`, with the sum
  divided by the number of present modalities for a head that averages.

  Attributes:
    head: ``{m: [k, d_m]}``, the rows :math:`V_m`, integration factors included.
    bias: ``[k]``.
    lipschitz: ``{m: [] | None}``, a sound l2 -> l2 bound of :math:`\phi_m`
      from raw inputs (normalisation included); None where there is none.
    factors: ``{m: [k]}`` or None. When given, ``head[m] = factors[m][:, None] *
      W_m`` with :math:`\|W_m\|_2 \le 1`, so that :math:`\|V_m[y] - V_m[j]\|
      \le \sqrt{a_m[y]^2 + a_m[j]^2}`.
    integration: ``{m: [k]}`` or None, the factors of a head that has any,
      orthonormal or not: no statement about norms, so no certificate rests on
      it.
    positivity: how the parameters ``fusion/integration/alpha`` make
      ``integration``: ``"simplex"`` (its mean never moves), ``"softplus"``
      entry by entry, or None where that is not said; static.
    embedding_radius: ``{m: [] | None}`` or None, :math:`B_m` with
      :math:`\|\phi_m(x)\| \le B_m` for every x (projection on a ball); None
      where there is none.
    chain: ``{m: (W_1, ..., W_n) | None}`` or None, ``[out, in]`` matrices of an
      encoder that is dense from the flat raw input (normalisation included) to
      the embedding, activations with slopes in [0, 1] between them: it has
      constants class pair by class pair, see ``lipschitz.dense_chain``.
    linear: ``{m: (W_1, ...) | None}`` or None, a matrix for every linear map of
      an ordinary encoder (normalisation in the first), with at least its norm:
      for penalties, and never for a certificate.
    nominal: ``{m: [] | None}`` or None, what ``lipschitz`` is once parameters
      are projected (``Model.project``); for losses, which see them in between,
      and never for a certificate.
    reduction: ``"sum"``, or ``"mean"`` over present modalities; static.
    fusion: ``"additive"``: the logits are the sum of ``head[m] @ embedding[m]``
      over present modalities, plus bias; ``"joint"``: a map of all embeddings
      that is 1-Lipschitz in their joint l2 distance comes first, and then the
      rows of ``head``, the same ones for every modality; static.
  """

  head: Any
  bias: Any
  lipschitz: Any
  factors: Any = None
  integration: Any = None
  embedding_radius: Any = None
  chain: Any = None
  linear: Any = None
  nominal: Any = None
  positivity: str | None = dataclasses.field(
    default=None, metadata={"static": True}
  )
  reduction: str = dataclasses.field(default="sum", metadata={"static": True})
  fusion: str = dataclasses.field(default="additive", metadata={"static": True})


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TokenParts:
  """What training without labels needs to know of a token transformer.

  Attributes:
    num_tokens: ``{m: N_m}``.
    sizes: ``{m: p_m}``, the values of a token; of integer ids the size of the
      vocabulary.
    width: d of all tokens, and of the pooled features.
    ids: the modalities whose tokens are integer ids, 0 for padding.
    patches: ``patches(inputs, present) -> {m: [b, N_m, p_m]}``: what each token
      holds, normalised as the encoder sees it, zeros where absent; ids
      ``[b, N_m]``.
    attend: ``attend(params, tokens, keep) -> (pooled [b, d], {m: [b, N_m,
      d]})``, the transformer without its head, on tokens ``{m: [b, N_m, d]}``
      of any modalities, ``keep`` {m: bool[b, N_m]} saying which exist.
    real: ``real(tokens, present) -> {m: bool[b, N_m]}``: which are of a present
      modality and no padding.
  """

  num_tokens: Mapping[str, int]
  sizes: Mapping[str, int]
  width: int
  ids: tuple[str, ...]
  patches: Callable[..., Any]
  attend: Callable[..., Any]
  real: Callable[..., Any]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Captions:
  """What a model that spells captions offers beside its logits.

  Attributes:
    slots: the modalities, in the order in which a caption names them.
    words: one a class.
    none: the word for a modality that is absent.
    vocabulary: what each token id stands for.
    length: t, of the longest caption.
    pad: the id of padding.
    end: the id of the end.
    spell: ``spell(classes {m: int[b]}, present) -> int[b, t]``.
    texts: ``texts(ids) -> list of strings``, on the host.
    ids: ``ids(text) -> int[t]``, on the host.
    logits: ``logits(params, embeddings, present, ids, letters=None) -> [b, t,
      V]`` of every letter given those before it (teacher forcing); ``letters``
      [b, t, d] replaces the embedded ids.
    generate: ``generate(params, embeddings, present, prompt=None, fixed=None)
      -> int[b, t]``, greedy; ``prompt`` holds where ``fixed`` bool[b, t] is
      True.
    letters: ``letters(params) -> [V, d]``, the embedding of every token.
    log_likelihood: ``log_likelihood(logits, ids) -> [b]``, log p of sentences,
      padding left out.
  """

  slots: tuple[str, ...]
  words: tuple[str, ...]
  none: str
  vocabulary: tuple[str, ...]
  length: int
  pad: int
  end: int
  spell: Callable[..., Any]
  texts: Callable[..., Any]
  ids: Callable[..., Any]
  logits: Callable[..., Any]
  generate: Callable[..., Any]
  letters: Callable[..., Any]
  log_likelihood: Callable[..., Any]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Model:
  """A multimodal model of a task, as pure functions over pytrees.

  It classifies; or it predicts a number (``target``), or for every class
  whether it is there (``multi_label``).

  Made from flax modules by ``robust_mm.models``, or by hand from any functions
  that keep this contract.

  Attributes:
    modalities: sorted names.
    num_classes: k; 1 of a regression.
    init: ``init(key) -> (params, state)``, plain dict pytrees.
    encode: ``encode(params, state, inputs, present, *, train=False, key=None)
      -> ({m: [b, d_m]}, state)``. Normalisation of raw inputs happens inside.
      Of a token transformer the embeddings are tokens ``[b, N_m, d]``. An
      embedding depends on the input and presence of its own modality alone.
    fuse: ``fuse(params, embeddings, present) -> Outputs``.
    geometry: ``geometry(params) -> Geometry``, or None where the logits are no
      sum of per-modality terms.
    freeze: ``freeze(params) -> (model, params)`` with the same logits, or None.
      What is made of parameters alone (orthonormal weights) is made once: for
      attacks and sampling, which call a model thousands of times. Not to be
      trained, and the certificate is the original's.
    project: ``project(params) -> params`` with weights put back into the set
      they belong to (orthonormal ones), or None where nothing needs it. Call it
      every few updates and at the end; the training loop does.
    input_shapes: ``{m: shape}`` of one input, where the model knows them:
      ``certify`` then refuses other shapes by name.
    tokens: the modalities whose inputs are integer tokens; None where the model
      does not say.
    target: scale of the one number a regression predicts; None otherwise.
    multi_label: True where an example has any number of the classes, see
      ``models.multi_label``.
    features: ``features(params, embeddings, present) -> [b, d]``: what the last
      linear layer, ``params["fusion"]["last"]`` with ``kernel`` [d, k] and
      ``bias`` [k], sees; None where the head is another one.
    token_parts: of a token transformer, None of others.
    captions: of a model that spells captions, None of others.
    embed: ``embed(params, state, inputs, present) -> {m: [b, N_m, d]}``: the
      tokens of the modalities whose encoder can be split there (``vit``), of
      zeros where absent; None where there is no such modality.
    encode_tokens: ``encode_tokens(params, state, tokens, present, *,
      train=False, key=None) -> {m: [b, d_m]}``: what ``encode`` gives of the
      modalities in ``tokens``, from their tokens. None with ``embed``.
  """

  modalities: tuple[str, ...]
  num_classes: int
  init: Callable[..., Any]
  encode: Callable[..., Any]
  fuse: Callable[..., Outputs]
  geometry: Callable[..., Geometry] | None = None
  input_shapes: Mapping[str, tuple[int, ...]] | None = None
  tokens: tuple[str, ...] | None = None
  freeze: Callable[..., Any] | None = None
  project: Callable[..., Any] | None = None
  target: Target | None = None
  multi_label: bool = False
  features: Callable[..., Any] | None = None
  token_parts: TokenParts | None = None
  captions: Captions | None = None
  embed: Callable[..., Any] | None = None
  encode_tokens: Callable[..., Any] | None = None

  @property
  def task(self) -> str:
    """``"classification"``, ``"regression"`` or ``"multi_label"``."""
    if self.target is not None:
      return _tasks.REGRESSION
    return _tasks.MULTI_LABEL if self.multi_label else _tasks.CLASSIFICATION

  @property
  def classifies(self) -> bool:
    """Whether an example has one class, the argmax of the logits."""
    return self.task == _tasks.CLASSIFICATION

  def said(self, logits: Any) -> Any:
    """What of the logits is compared with labels where none is an argmax.

    The number ``[b]`` of a regression, the logits ``[b, k]`` of a multi-label
    model.
    """
    return logits[..., 0] if self.target is not None else logits

  def need_classes(self, what: str) -> None:
    """ValueError where ``what`` is about classes and the task is another."""
    if not self.classifies:
      raise ValueError(
        f"{what} needs a model that predicts classes, one an example; this one "
        f"predicts {_tasks.PREDICTS[self.task]}."
      )

  def apply(
    self,
    params: Params,
    state: State,
    inputs: Inputs,
    present: Present,
    *,
    train: bool = False,
    key: Any = None,
  ) -> tuple[Outputs, State]:
    """``fuse . encode``; evaluation mode unless ``train``.

    Inputs and presence may be host arrays.
    """
    inputs, present = jax.tree.map(jnp.asarray, (dict(inputs), dict(present)))
    embeddings, state = self.encode(
      params, state, inputs, present, train=train, key=key
    )
    return self.fuse(params, embeddings, present), state
