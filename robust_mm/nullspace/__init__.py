r"""What a network does not see: exact kernels, and noise that hardly matters.

Of a linear stem the kernel is exact: :func:`patch_kernel`,
:func:`embedding_kernel` of a vision transformer, :func:`linear_kernel`,
:func:`project_kernel` for maps that are functions, and
:func:`largest_kernel_noise` for how large it gets inside the range of pixels::

  kernel = nullspace.embedding_kernel(net, params)
  noise = nullspace.largest_kernel_noise(kernel, images, direction)

Of a whole encoder it is approximate: :func:`encoder_noise` finds one tensor,
the same for all inputs, that changes outputs by at most eps on average, on data
it was not found on, and says whether the next size up failed. :func:`items_of`
is a model of several modalities, one of which gets noise. For training
there are :class:`NoiseBank` and :func:`augmented_loss`, and what any gain has
to be compared with: :func:`permute`, :func:`random_direction`,
:func:`random_at_criterion`, :func:`published_noise`.

What may be claimed: exact invariance of the real-arithmetic network to kernel
noise; that a mean criterion is below eps on unseen data, with its radius, norm
and controls. Nothing here certifies robustness, and no radius is the largest.

Inside, each module imports only from those before it: kernels, boxes, tokens,
criteria, searching, solver, published, banks, terms, of_models.

References:
  `Liu et al. (2024) <https://arxiv.org/abs/2403.10476>`_, the idea, and the
  published procedure.
"""

from robust_mm.nullspace.banks import NoiseBank
from robust_mm.nullspace.banks import empty_bank
from robust_mm.nullspace.boxes import largest_kernel_noise
from robust_mm.nullspace.criteria import Items
from robust_mm.nullspace.criteria import criterion
from robust_mm.nullspace.kernels import PatchKernel
from robust_mm.nullspace.kernels import embedding_kernel
from robust_mm.nullspace.kernels import head_kernel
from robust_mm.nullspace.kernels import linear_kernel
from robust_mm.nullspace.kernels import patch_kernel
from robust_mm.nullspace.kernels import project_kernel
from robust_mm.nullspace.of_models import items_of
from robust_mm.nullspace.published import published_noise
from robust_mm.nullspace.published import random_at_criterion
from robust_mm.nullspace.searching import Search
from robust_mm.nullspace.searching import search
from robust_mm.nullspace.solver import NoiseResult
from robust_mm.nullspace.solver import Splits
from robust_mm.nullspace.solver import encoder_noise
from robust_mm.nullspace.solver import split_items
from robust_mm.nullspace.terms import Terms
from robust_mm.nullspace.terms import augmented_loss
from robust_mm.nullspace.terms import paired_loss
from robust_mm.nullspace.tokens import add as add_noise
from robust_mm.nullspace.tokens import center
from robust_mm.nullspace.tokens import permute
from robust_mm.nullspace.tokens import random_direction
from robust_mm.nullspace.tokens import relative_radius
from robust_mm.nullspace.tokens import scale

__all__ = [
  "Items",
  "NoiseBank",
  "NoiseResult",
  "PatchKernel",
  "Search",
  "Splits",
  "Terms",
  "add_noise",
  "augmented_loss",
  "center",
  "criterion",
  "embedding_kernel",
  "empty_bank",
  "encoder_noise",
  "head_kernel",
  "items_of",
  "largest_kernel_noise",
  "linear_kernel",
  "paired_loss",
  "patch_kernel",
  "permute",
  "project_kernel",
  "published_noise",
  "random_at_criterion",
  "random_direction",
  "relative_radius",
  "scale",
  "search",
  "split_items",
]
