"""What a run starts from, ``config.init_from``, and what it sees of the data.

The run it starts from is described without jax, so that a mistake is answered
at once; the arrays themselves are read by ``training.loading``.
"""

import json
import pathlib
from typing import Any

from robust_mm import _validate
from robust_mm import data
from robust_mm.training import runs

# Facts of the run that the data must agree with.
_SAME = ("input_shapes", "kinds")


def check(config) -> dict | None:
  """Facts of the run that ``config.init_from`` names, None without one.

  Raises:
    UserError: one sentence naming the key: no run there, none of its phases
      has ended, no such phase, or a model of another configuration.
  """
  if not config.init_from:
    return None
  folder = pathlib.Path(config.init_from)
  if not (folder / runs.CONFIG_FILE).is_file():
    raise _validate.UserError(
      f"config.init_from must be the work directory of a finished run; "
      f"{folder} has no {runs.CONFIG_FILE}."
    )
  stored, facts = runs.read_config(folder), runs.describe(folder)
  if not facts["finished"]:
    raise _validate.UserError(
      f"config.init_from: no phase of the run in {folder} has ended yet."
    )
  if config.init_phase:
    _validate_phase(config.init_phase, facts)
  differs = difference(stored, config)
  if differs:
    recipe = stored.recipe.name
    hint = ""
    if recipe != "pretrain":
      hint = (
        f" It is a run of the recipe {recipe!r}; configs/pretraining.py makes "
        "one to start from."
      )
    raise _validate.UserError(
      f"config.init_from: the run in {folder} has another model: {differs}."
      f"{hint}"
    )
  return facts


def difference(stored, config) -> str | None:
  """The first key in which the models of two configurations differ, said."""
  there, here = (
    runs.flatten(json.loads(c.model.to_json())) for c in (stored, config)
  )
  for key in sorted(there.keys() | here.keys()):
    if there.get(key) != here.get(key):
      said = [
        f"{tree[key]!r}" if key in tree else "not set" for tree in (there, here)
      ]
      return f"config.model.{key} is {said[0]} there and {said[1]} here"
  return None


def _validate_phase(phase: str, facts: dict) -> None:
  finished = facts["finished"]
  if phase not in finished:
    raise _validate.UserError(
      f"config.init_phase must be one of {', '.join(finished)}; got {phase!r}."
      f"{_validate.suggestion(phase, finished)}"
    )


def adopt(facts: dict, earlier: dict | None, config) -> dict[str, Any]:
  """The facts of a run that starts from another one.

  Normalisation and vocabulary are those its parameters were trained with.

  Raises:
    UserError: the data has other inputs than that run had, naming the key.
  """
  if earlier is None:
    return facts
  for key in _SAME:
    if facts[key] != earlier[key]:
      raise _validate.UserError(
        f"config.init_from: the run in {config.init_from} was trained on "
        f"{key} {earlier[key]}; here they are {facts[key]}."
      )
  for name, size in facts["vocabulary"].items():
    if size > earlier["vocabulary"][name]:
      raise _validate.UserError(
        f"config.init_from: the run in {config.init_from} knows "
        f"{earlier['vocabulary'][name]} tokens of modality {name!r}; here "
        f"there are {size}."
      )
  kept = {key: earlier[key] for key in ("normalization", "vocabulary")}
  return {**facts, **kept}


def labelled(config, source):
  """A split with ``config.data.labelled`` alone present; all by default.

  Raises:
    ValueError: naming the key, for a modality that the source does not have.
  """
  # Runs of earlier versions do not state it.
  names = tuple(config.data.get("labelled", ()))
  if not names:
    return source
  _validate.known(source.modalities, **{"config.data.labelled": names})
  return source.with_transforms((data.transforms.keep_only(names),))
