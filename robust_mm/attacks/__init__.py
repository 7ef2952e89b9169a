"""Attacks on multimodal classifiers, as values.

``attack = attacks.pgd(norm=2, budget=0.5)`` is a frozen object;
``attack(key, logits_fn, inputs, label)`` are adversarial inputs. A perturbation
lives in one joint ball over all modalities or in a ball for each; what must not
move comes back bit-identical. Report robust accuracy with :func:`auto`, on the
survivors (:func:`attack_survivors`), and distances with :func:`minimum_norm`
(:func:`distances`).

To be judged by an attack suite for torch, a function ``fn`` from one array to
logits becomes a torch function, gradient included::

  class Logits(torch.autograd.Function):
    def forward(ctx, x):
      logits, ctx.vjp = jax.vjp(fn, x.detach().numpy())
      return torch.tensor(np.asarray(logits))
    def backward(ctx, slope):
      return torch.tensor(np.asarray(ctx.vjp(slope.numpy())[0]))

Give the suite ``Logits.apply`` in the place of a network. Modalities are joined
outside and cut apart in ``fn``; ``jax.jit`` of ``fn`` makes it fast.
"""

from robust_mm.attacks import losses
from robust_mm.attacks.ascent import apgd
from robust_mm.attacks.base import Attack
from robust_mm.attacks.boundaries import minimum_norm
from robust_mm.attacks.ensemble import auto
from robust_mm.attacks.gradient import fgm
from robust_mm.attacks.gradient import pgd
from robust_mm.attacks.measures import distances
from robust_mm.attacks.measures import logits_fn
from robust_mm.attacks.measures import robust_accuracy
from robust_mm.attacks.measures import survives
from robust_mm.attacks.queries import square
from robust_mm.attacks.registry import arguments
from robust_mm.attacks.registry import make
from robust_mm.attacks.registry import names
from robust_mm.attacks.substitutions import substitute
from robust_mm.attacks.survivors import Outcome
from robust_mm.attacks.survivors import attack_survivors

__all__ = [
  "Attack",
  "Outcome",
  "apgd",
  "arguments",
  "attack_survivors",
  "auto",
  "distances",
  "fgm",
  "logits_fn",
  "losses",
  "make",
  "minimum_norm",
  "names",
  "pgd",
  "robust_accuracy",
  "square",
  "substitute",
  "survives",
]
