"""Several noises at a time, for training: drawn from, replaced, refreshed."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import PRNGKeyArray

from robust_mm import _validate
from robust_mm.nullspace import tokens as tokens_lib

_STALE = 2.0  # times eps


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseBank:
  """K noises and what is known of them; a pytree of arrays.

  Attributes:
    noise: ``[K, N, d]``.
    radius: ``[K]``, relative.
    criterion: ``[K]``, when it was last measured.
    born: ``[K]`` int32, which addition put a member there, from 1; 0 where
      there is none.
  """

  noise: Any
  radius: Any
  criterion: Any
  born: Any

  @property
  def filled(self) -> Bool[Array, " K"]:
    """Where there is a member."""
    return self.born > 0

  def add(self, noise: Any, radius: Any, criterion: Any, *, eps: Any):
    """The bank with one more member.

    In the first free place; without one in that of the member with the largest
    criterion, if it exceeds 2 eps (or is not finite); else in that of the
    oldest.
    """
    stale = jnp.where(jnp.isnan(self.criterion), jnp.inf, self.criterion)
    worst = jnp.argmax(stale)
    oldest = jnp.argmin(self.born)  # free ones have 0
    free = self.born[oldest] == 0
    chosen = jnp.where(~free & (stale[worst] > _STALE * eps), worst, oldest)
    return NoiseBank(
      noise=self.noise.at[chosen].set(noise.astype(self.noise.dtype)),
      radius=self.radius.at[chosen].set(radius),
      criterion=self.criterion.at[chosen].set(criterion),
      born=self.born.at[chosen].set(jnp.max(self.born) + 1),
    )

  def sample(
    self,
    key: PRNGKeyArray,
    number: int,
    *,
    scaled: bool = True,
    pairs: bool = False,
  ) -> Float[Array, "b N d"]:
    """Noise for each of ``number`` items; 0 while there is no member.

    A member, each as likely as another, times a scale in (0, 1]: smaller noise
    changes less still. Signs are never flipped: -v is no nullspace noise.

    Args:
      key: typed.
      number: b.
      scaled: False for members as they are.
      pairs: mix each with a second one, in a random convex combination.
    """
    which_key, other_key, mix_key, scale_key = jax.random.split(key, 4)
    filled = self.filled
    count = jnp.sum(filled)
    # Places of members come first.
    places = jnp.argsort(~filled)
    last = jnp.maximum(count, 1)

    def draw(key):
      return self.noise[places[jax.random.randint(key, (number,), 0, last)]]

    noise = draw(which_key)
    if pairs:
      mix = jax.random.uniform(mix_key, (number, 1, 1))
      noise = mix * noise + (1 - mix) * draw(other_key)
    if scaled:
      scale = 1 - jax.random.uniform(scale_key, (number, 1, 1))
      noise = scale * noise
    return jnp.where(count > 0, noise, 0.0)

  def permute(self, key: PRNGKeyArray, axis: str = "entries"):
    """The bank with every member permuted, each in its own way."""
    keys = jax.random.split(key, self.noise.shape[0])
    noise = jax.vmap(lambda v, k: tokens_lib.permute(v, k, axis))(
      self.noise, keys
    )
    return dataclasses.replace(self, noise=noise)


def empty_bank(num_members: int, shape: tuple[int, int]) -> NoiseBank:
  """A bank without members, for noise of ``shape`` (N, d).

  >>> empty_bank(16, (4, 8)).noise.shape
  (16, 4, 8)

  Raises:
    ValueError: ``num_members`` below 1.
  """
  _validate.at_least(1, num_members=num_members)
  return NoiseBank(
    noise=jnp.zeros((num_members, *shape), jnp.float32),
    radius=jnp.zeros(num_members, jnp.float32),
    criterion=jnp.zeros(num_members, jnp.float32),
    born=jnp.zeros(num_members, jnp.int32),
  )
