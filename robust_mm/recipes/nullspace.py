r"""Fine-tuning with noise that a network should not notice, and its controls.

Every so many updates noise is sought for the network as it stands
(``robust_mm.nullspace``), on training examples and with its parameters frozen;
in between the network learns to say the same with it. No gradient flows through
the search.

References:
  `Liu et al. (2024) <https://arxiv.org/abs/2403.10476>`_; their procedure is
  ``noise="published"``.
"""

import inspect
from collections.abc import Sequence

import optax

from robust_mm import _validate
from robust_mm import nullspace as nullspace_lib
from robust_mm._types import Model
from robust_mm.nullspace import published as published_lib
from robust_mm.nullspace import searching
from robust_mm.nullspace import tokens as tokens_lib
from robust_mm.recipes import noise_rounds
from robust_mm.recipes import objectives
from robust_mm.recipes import phases
from robust_mm.recipes import restraints

_TENTH = 10  # published passes take a tenth of the minibatches


def nullspace(
  model: Model,
  *,
  num_steps: int,
  tx: optax.GradientTransformation,
  noise: str = "bank",
  noisy: Sequence[str] = (),
  eps: float = 0.03,
  segment_steps: int = 40,
  num_members: int = 16,
  convex_pairs: bool = False,
  radius_factor: float = 1.0,
  consistency_weight: float = 0.0,
  label_smoothing: float = 0.0,
  restraint: restraints.Restraint | None = None,
  permuted: str = "entries",
  profile: str = "token",
  objective: str = "criterion",
  solver_examples: int = 1024,
  solver_steps: int = 100,
  solver_batch: int = 64,
  solver_lr: float = 0.02,
  start_radius: float = 0.5,
  max_radius: float = 100.0,
  num_bisections: int = 3,
  limit: float = 3.0,
  published_lr: float = 0.1,
  published_objective: str = "logit_l2",
  published_passes: int = 3,
  published_batches: int = 8,
  pretrain_steps: int = 0,
  pretrain_lr: float = 1e-3,
) -> phases.Recipe:
  r"""Cross-entropy on clean inputs, and on inputs with noise on their tokens.

  .. math:: L = CE(f(u), y) + CE(f(u + v), y)
            + \lambda\, KL(sg\, \pi(u) \,\|\, \pi(u + v))

  Every modality whose encoder can be split at its tokens (``vit``) has noise of
  its own, sought with the others as they are. What ``noise`` says:

  ====================  ======================================================
  clean                 no second term
  twice_clean           a second clean view: other dropout, other augmentation
  random                Gaussian, of profile and radius as a search finds them
  random_at_criterion   Gaussian, shrunk until its criterion is eps
  permuted              the learnt one, its entries permuted anew each round
  published             by the published procedure, one for all items of a round
  corrected             as ``nullspace.encoder_noise`` finds it, one a round
  bank                  several of these, at scales in (0, 1], drawn by item
  ====================  ======================================================

  ``random``, ``random_at_criterion`` and ``permuted`` are drawn as ``bank`` is.
  The search is one on the network of the arm itself: as the networks drift
  apart, so do the radii. A gain of nullspace noise is one over ``twice_clean``
  *and* over those. On images of ``av_digits`` there was none, of one small
  network: random and permuted noise, which change more, gained more
  (``benchmarks/results/nullspace_av_digits.txt``). Without dropout and
  augmentation a second clean view is the first one again.

  What eps bounds is noise on one modality, the others as they are. Of several
  noisy modalities training draws them together, which nothing bounds.

  Formal guarantees:
    - Noise on an absent modality changes no bit of loss or gradient.
    - Banks are part of the state: a killed run resumes bit by bit.
    - Noise learns from training examples alone.

  Args:
    model: classifies; with at least one modality that has tokens.
    num_steps: updates of fine-tuning.
    tx: its optimiser.
    noise: see above.
    noisy: modalities that get noise; all that have tokens by default.
    eps: tolerance on the mean criterion.
    segment_steps: updates between two searches; the first one follows the first
      update, which has no noise yet.
    num_members: of a bank; one search adds one, in place of the oldest, or of
      one whose criterion has come to exceed 2 eps; of random noise, which no
      eps bounds, always of the oldest. A search without result adds none.
    convex_pairs: draw convex combinations of two members.
    radius_factor: noise in training is this much larger than what was found:
      beyond 1 it is no eps-approximate nullspace noise.
    consistency_weight: lambda; published: 0.
    label_smoothing: share of every label spread over all classes.
    restraint: a penalty of wrong logits (``recipes.Restraint``) wherever there
      is cross-entropy: in both phases, and of both terms above; or None.
    permuted: ``entries``, ``tokens`` or ``channels``.
    profile: ``token`` or ``global``.
    objective: of the search.
    solver_examples: training examples of one search, at least 128; half of
      them decide what is feasible.
    solver_steps: at each radius.
    solver_batch: examples of such a step.
    solver_lr: of such a step.
    start_radius: radius that the first search begins with; later ones begin
      just below the last one found, and nowhere below this one.
    max_radius: last radius.
    num_bisections: of the last bracket.
    limit: published noise begins uniform in (-limit, limit).
    published_lr: of AdamW on it; 0.1 or 0.03 in the released codes.
    published_objective: ``logit_l2`` or ``logit_sq``, one in each of them.
    published_passes: of published noise; its rate follows a cosine over ten
      times as many updates as there are.
    published_batches: minibatches of ``solver_batch`` that a pass takes, from
      the half of ``solver_examples`` that learns. As published it is a tenth of
      those of the training set, all of it to choose from; the default is a
      short form of it.
    pretrain_steps: updates on cross-entropy alone in a phase before, for a run
      that does not start from a trained one.
    pretrain_lr: of AdamW there, along a cosine.

  Raises:
    ValueError: naming the argument that is wrong.
  """
  _validate.one_of(noise_rounds.ARMS, noise=noise)
  model.need_classes("nullspace")
  if restraint is not None:
    restraint.check(model)
  _refuse_idle(
    noise,
    consistency_weight=consistency_weight,
    radius_factor=radius_factor,
    noisy=noisy,
    convex_pairs=convex_pairs,
    num_members=num_members,
    permuted=permuted,
    profile=profile,
    objective=objective,
    limit=limit,
    published_lr=published_lr,
    published_objective=published_objective,
    published_passes=published_passes,
    published_batches=published_batches,
  )
  _validate.at_least(
    1,
    segment_steps=segment_steps,
    num_members=num_members,
    solver_steps=solver_steps,
    solver_batch=solver_batch,
    published_passes=published_passes,
    published_batches=published_batches,
  )
  _validate.at_least(0, pretrain_steps=pretrain_steps)
  _validate.at_least(2 * searching.MIN_HOLDOUT, solver_examples=solver_examples)
  _validate.non_negative(consistency_weight=consistency_weight)
  _validate.positive(
    eps=eps,
    radius_factor=radius_factor,
    limit=limit,
    pretrain_lr=pretrain_lr,
    solver_lr=solver_lr,
    published_lr=published_lr,
  )
  _validate.one_of(
    published_lib.OBJECTIVES, published_objective=published_objective
  )
  _validate.below_one(label_smoothing=label_smoothing)
  _validate.one_of(tokens_lib.AXES, permuted=permuted)
  search = nullspace_lib.Search(
    eps=eps,
    profile=profile,
    objective=objective,
    num_steps=solver_steps,
    batch_size=solver_batch,
    lr=solver_lr,
    start_radius=start_radius,
    max_radius=max_radius,
    num_bisections=num_bisections,
  )
  settings = noise_rounds.Settings(
    model=model,
    noise=noise,
    noisy=_noisy(model, noise, noisy),
    num_members=1 if noise in noise_rounds.SINGLE else num_members,
    convex_pairs=convex_pairs,
    radius_factor=radius_factor,
    consistency_weight=consistency_weight,
    label_smoothing=label_smoothing,
    restraint=restraint,
    permuted=permuted,
    search=search,
    published=published_lib.Settings(
      eps=eps,
      limit=limit,
      lr=published_lr,
      objective=published_objective,
      num_passes=published_passes,
      batches=published_batches,
      batch_size=solver_batch,
      schedule_steps=_TENTH * published_passes * published_batches,
    ),
  )
  job = phases.Job(
    name="noise",
    run=noise_rounds.make_round(settings),
    period=segment_steps,
    start=1,
    batch_size=solver_examples,
    min_batch=2 * searching.MIN_HOLDOUT,
    option="solver_examples",
    heavy=True,
    source="train",
  )
  phase = phases.Phase(
    name="nullspace",
    num_steps=num_steps,
    tx=tx,
    extra=noise_rounds.make_extra(settings),
    update=noise_rounds.make_update(settings, tx),
    jobs=(job,) if settings.noisy else (),
    views=2 if noise == "twice_clean" else 1,
    progress=restraint is not None,
  )
  before = []
  if pretrain_steps:
    schedule = optax.cosine_decay_schedule(pretrain_lr, pretrain_steps)
    before.append(
      phases.Phase(
        name="pretrain",
        num_steps=pretrain_steps,
        tx=optax.adamw(schedule, weight_decay=0.05),
        loss=objectives.cross_entropy_loss(
          model, label_smoothing=label_smoothing, restraint=restraint
        ),
        progress=restraint is not None,
      )
    )
  return phases.Recipe(name=f"nullspace-{noise}", phases=(*before, phase))


# Options that some arms alone look at.
_WITH_NOISE = tuple(a for a in noise_rounds.ARMS if a not in noise_rounds.CLEAN)
_BANKS = tuple(a for a in _WITH_NOISE if a not in noise_rounds.SINGLE)
_SEARCHED = ("random", "permuted", "corrected", "bank")
_PUBLISHED = ("published",)
_USED_BY = {
  "consistency_weight": ("twice_clean", *_WITH_NOISE),
  "radius_factor": _WITH_NOISE,
  "noisy": _WITH_NOISE,
  "convex_pairs": _BANKS,
  "num_members": _BANKS,
  "permuted": ("permuted",),
  "profile": _SEARCHED,
  "objective": _SEARCHED,
  "limit": _PUBLISHED,
  "published_lr": _PUBLISHED,
  "published_objective": _PUBLISHED,
  "published_passes": _PUBLISHED,
  "published_batches": _PUBLISHED,
}


def _refuse_idle(noise: str, **given) -> None:
  """ValueError for an option that is set and would change nothing."""
  defaults = inspect.signature(nullspace).parameters
  for name, value in given.items():
    default = defaults[name].default
    value = tuple(value) if isinstance(default, tuple) else value
    if noise not in _USED_BY[name] and value != default:
      raise ValueError(
        f"{name} changes nothing with noise={noise!r}: leave it at "
        f"{default!r}; {', '.join(_USED_BY[name])} look at it."
      )


def _noisy(model: Model, noise: str, named) -> tuple[str, ...]:
  """The modalities that get noise; none of the clean arms."""
  named = (named,) if isinstance(named, str) else tuple(named)
  _validate.known(model.modalities, noisy=named)
  if len(set(named)) < len(named):
    raise ValueError(f"noisy must name a modality once, got {named}.")
  if noise in noise_rounds.CLEAN:
    return ()
  if model.encode_tokens is None:
    raise ValueError(
      f"noise={noise!r} needs a modality whose encoder can be split at its "
      f"tokens, such as 'vit'; {', '.join(model.modalities)} have none."
    )
  shapes = noise_rounds.token_shapes(model)
  for name in named:
    if name not in shapes:
      raise ValueError(
        f"noisy names the modality {name!r}, whose encoder has no tokens; "
        f"those of {', '.join(shapes)} have."
      )
  return named or tuple(shapes)
