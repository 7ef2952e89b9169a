"""The value that every factory makes, and how it is called."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import PRNGKeyArray

from robust_mm import corruptions
from robust_mm.augmentations import options as options_lib
from robust_mm.augmentations import transforms


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
  """One operation with its options; made by the factories.

  Hashable, and a pytree without leaves: jitted functions take it as it is.

  Attributes:
    kind: its factory's name.
    options: ``((option, value), ...)``.
  """

  kind: str
  options: tuple[tuple[str, Any], ...]

  @property
  def is_identity(self) -> bool:
    """Whether its strength is 0."""
    return options_lib.idle(self.kind, dict(self.options))

  def check(
    self,
    shape: tuple[int, ...],
    dtype: Any,
    *,
    path: str | None = None,
    name: str | None = None,
  ) -> None:
    """Refuses inputs that the operation is not for.

    Args:
      shape: of one input.
      dtype: of it.
      path: the key that the sentence begins with; the kind by default.
      name: of the modality.

    Raises:
      ValueError: integers, or a shape of another form.
    """
    path = path or self.kind
    who = "the input" if name is None else f"the modality {name!r}"
    if not jnp.issubdtype(dtype, jnp.floating):
      raise ValueError(
        f"{path} is for floating inputs; {who} holds {jnp.dtype(dtype)}."
      )
    fitting = transforms.FORMS.get(self.kind, transforms.ALL)
    known = 1 <= len(shape) <= len(transforms.ALL)
    form = corruptions.form(shape, dtype) if known else "array"
    if form not in fitting:
      article = "an" if form[0] in "aeiou" else "a"
      raise ValueError(
        f"{path} is for {', '.join(fitting)}; {who} is {article} {form} of "
        f"shape {tuple(shape)}."
      )
    self._check_channels(shape[-1], path, who)

  def _check_channels(self, channels: int, path: str, who: str) -> None:
    chosen = dict(self.options)
    if self.kind == "rotate" or chosen.get("per") == "axis":
      if channels % 3:
        raise ValueError(
          f"{path} is for vectors (x, y, z) one after the other; the last axis "
          f"of {who} has {channels} entries, no multiple of 3."
        )
      groups = chosen.get("groups", 1)
      if channels // 3 % groups:
        raise ValueError(
          f"{path}.groups must divide the {channels // 3} vectors of {who}, "
          f"got {groups}."
        )

  def __call__(self, key: PRNGKeyArray, x: Any, present: Any) -> Array:
    """Changes a batch; what is absent comes back as it was, bit by bit.

    The randomness of an example is that of ``fold_in(key, row)``.

    Args:
      key: typed; another one for every batch.
      x: floats ``[b, ...]``.
      present: ``bool[b]``.

    Returns:
      An array of the same shape and dtype.

    Raises:
      ValueError: integers, or a shape of another form.
    """
    x, present = jnp.asarray(x), jnp.asarray(present)
    self.check(x.shape[1:], x.dtype)
    if self.is_identity:
      return x
    function = transforms.FUNCTIONS[self.kind]
    # Laid out over the devices as presence is; absent rows draw for nobody.
    row = jnp.where(present, jnp.arange(x.shape[0], dtype=jnp.uint32), 0)
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def one(row, value):
      own = jax.random.fold_in(key, row)
      found = function(own, value.astype(wide), **dict(self.options))
      return found.astype(x.dtype)

    changed = jax.vmap(one)(row, x)
    here = jnp.reshape(present, present.shape + (1,) * (x.ndim - 1))
    return jnp.where(here, changed, x)


def make(kind: str, path: str | None = None, **given: Any) -> Augmentation:
  """A checked value; ``path`` is the key that sentences begin with."""
  found = options_lib.complete(kind, given, path or kind)
  return Augmentation(kind=kind, options=tuple(found.items()))
