"""Values on the command line: parsed, or refused in one sentence."""

import argparse
import ast
import shlex


def count(text: str) -> int:
  """An integer of at least 1."""
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
  return int(text)


def path(text: str) -> tuple[float, ...]:
  """``0:1:0.1``, ends included, or ``0,0.5,1``: points in [0, 1].

  >>> path("0:1:0.25")
  (0.0, 0.25, 0.5, 0.75, 1.0)
  """
  wrong = argparse.ArgumentTypeError(
    f"must be FROM:TO:STEP or numbers, all in [0, 1], got {text}"
  )
  try:
    if ":" in text:
      first, last, step = (float(part) for part in text.split(":"))
      if not step > 0:
        raise wrong
      number = round((last - first) / step)
      # Rounded, so that 0.3 is the 0.3 one would write.
      points = [round(first + i * step, 10) for i in range(number + 1)]
      if not points or abs(points[-1] - last) > 1e-9:
        raise wrong
    else:
      points = [float(part) for part in text.split(",")]
  except ValueError as error:
    raise wrong from error
  if not all(0 <= point <= 1 for point in points):
    raise wrong
  return tuple(points)


def whole(text: str) -> int:
  """An integer of at least 0."""
  if not text.isdecimal():
    raise argparse.ArgumentTypeError(f"must be 0, 1, 2, ..., got {text}")
  return int(text)


def budget(text: str) -> dict[str, float]:
  """``left=0.3,right=inf`` as ``{modality: size}``."""
  sizes = _named(text)
  if sizes is None or not all(size >= 0 for size in sizes.values()):
    raise argparse.ArgumentTypeError(
      f"must be a number of at least 0 for each modality, such as "
      f"left=0.3,right=0.1; got {text}"
    )
  return sizes


def _named(text: str) -> dict[str, float] | None:
  """``left=0.3,right=inf`` as a dict; None for anything else."""
  sizes = {}
  for part in text.split(","):
    name, _, number = part.rpartition("=")
    try:
      size = float(number)
    except ValueError:
      return None
    if not name:
      return None
    if name in sizes:
      raise argparse.ArgumentTypeError(f"names {name} twice: {text}")
    sizes[name] = size
  return sizes


def radii(text: str) -> tuple[float, ...]:
  """``0.5,0.1`` as positive numbers, ascending."""
  try:
    values = tuple(sorted(float(part) for part in text.split(",")))
  except ValueError:
    values = (float("nan"),)
  if not all(0 < value < float("inf") for value in values):
    raise argparse.ArgumentTypeError(
      f"must be positive numbers such as 0.1,0.5; got {text}"
    )
  return values


def sigma(text: str) -> float | dict[str, float]:
  """``0.25``, or ``left=0.25,right=0.1`` as ``{modality: sigma}``."""
  # One number is that of a modality without a name.
  sizes = _named(text if "=" in text else f"all={text}")
  if sizes is None or not all(0 < s < float("inf") for s in sizes.values()):
    raise argparse.ArgumentTypeError(
      "must be one positive number such as 0.25, or one for each modality such "
      f"as left=0.25,right=0.1; got {text}"
    )
  return sizes if "=" in text else sizes["all"]


def keep(text: str) -> dict[str, int]:
  """``left=16,right=8`` as ``{modality: 16, ...}``, whole numbers."""
  sizes = _named(text)
  if sizes is None or not all(
    size >= 1 and size == size // 1 for size in sizes.values()
  ):
    raise argparse.ArgumentTypeError(
      "must be a whole number of at least 1 for each modality, such as "
      f"left=16,right=8; got {text}"
    )
  return {name: int(size) for name, size in sizes.items()}


def chance(text: str) -> float:
  """A number in (0, 1)."""
  try:
    value = float(text)
  except ValueError:
    value = float("nan")
  if not 0 < value < 1:
    raise argparse.ArgumentTypeError(f"must lie in (0, 1), got {text}")
  return value


SMOOTHING = (
  "sigma",
  "keep",
  "votes",
  "num_samples",
  "num_selection",
  "alpha",
  "seed",
  "chunk_size",
)


def words(text: str) -> list[str]:
  """``--a=1 --b='2 3'`` as a shell divides it."""
  try:
    return shlex.split(text)
  except ValueError as error:
    raise argparse.ArgumentTypeError(f"{error}: {text}") from error


def add_sizes(command) -> None:
  """The options that say how large a change is, and in what."""
  command.add_argument(
    "--radius",
    type=radii,
    metavar="R,R,...",
    help="sizes of a change, to all modalities together and to each alone "
    "(default: 0.1,0.25,0.5; with --norm=linf 0.01,0.02,0.05)",
  )
  command.add_argument(
    "--budget",
    type=budget,
    action="append",
    default=[],
    metavar="NAME=SIZE,...",
    help="a size for each modality, used all at once, such as "
    "left=0.3,right=0.1; one that is not named does not change, inf is any "
    "change at all; may be given several times",
  )
  command.add_argument(
    "--max-missing",
    type=whole,
    default=0,
    metavar="N",
    help="besides every --budget (without one: besides no change at all), any "
    "N modalities may be taken away (default: 0)",
  )
  command.add_argument(
    "--norm",
    choices=("l2", "linf", "l1"),
    help="how sizes are measured. No change below the radius r of an example "
    "alters its prediction, where a change is below r when: l2, the Euclidean "
    "norms of the modalities, squared and added, stay below r squared; linf, "
    "every entry of every modality moves by less than r; l1, all absolute "
    "changes of all entries add up to less than r; each in units. A modality's "
    "own radius leaves the others unchanged (default: the norm of the run's "
    "evaluation)",
  )
  command.add_argument(
    "--units",
    choices=("raw", "relative"),
    help="raw input values, or each modality's median distance to its mean, in "
    "the norm (default: the units of the run's evaluation)",
  )


def add_smoothing(command: argparse.ArgumentParser) -> None:
  """The options of ``--source=smoothing``; None where they are not given."""
  group = command.add_argument_group(
    "randomised smoothing",
    "with --source=smoothing: any model, thousands of noisy forward passes per "
    "example; every certificate holds with probability 1 - alpha and is about "
    "the smoothed classifier (default noise: that of the run's evaluation)",
  )
  group.add_argument(
    "--sigma",
    type=sigma,
    metavar="S",
    help="standard deviation of Gaussian noise in units: 0.25, or "
    "left=0.25,right=0.1",
  )
  group.add_argument(
    "--keep",
    type=keep,
    metavar="NAME=K,...",
    help="of these modalities only K random pixels, frames or tokens are seen; "
    "their budgets and radii count modified ones. Without --sigma the others "
    "have no noise and must not change",
  )
  group.add_argument(
    "--votes",
    type=count,
    metavar="K",
    help="no noise: every choice of K modalities has one vote; exact, against "
    "modalities that are replaced by anything",
  )
  group.add_argument(
    "--num-samples",
    type=count,
    metavar="N",
    help="noisy copies that estimate a class (default: 10000)",
  )
  group.add_argument(
    "--num-selection",
    type=count,
    metavar="N",
    help="other copies that choose it first (default: 100)",
  )
  group.add_argument(
    "--alpha",
    type=chance,
    help="chance for each example of a wrong certificate (default: 0.001)",
  )
  group.add_argument("--seed", type=whole, help="of the noise (default: 0)")
  group.add_argument(
    "--chunk-size",
    type=count,
    metavar="N",
    help="copies of an example in one forward pass: less needs less memory, "
    "and draws other noise (default: 1000)",
  )


def smoothing_options(options) -> dict:
  """What was given of them, ``{name: value}``."""
  given = {name: getattr(options, name) for name in SMOOTHING}
  return {name: value for name, value in given.items() if value is not None}


def labels(text: str) -> tuple[int, ...] | None:
  """``3`` or ``0,3,7`` as classes; ``all`` as None."""
  if text == "all":
    return None
  parts = text.split(",")
  if not all(part.isdecimal() for part in parts):
    raise argparse.ArgumentTypeError(
      f"must be classes such as 3 or 0,3,7, or all; got {text}"
    )
  return tuple(map(int, parts))


def others(text: str) -> str | int:
  """``absent``, ``joint``, ``average``, or the number of an item."""
  if text.isdecimal():
    return int(text)
  if text not in OTHERS:
    raise argparse.ArgumentTypeError(
      f"must be {', '.join(OTHERS)} or the number of an item, got {text}"
    )
  return text


def scale(text: str) -> float | str:
  """A positive number, or ``auto``."""
  if text == "auto":
    return text
  try:
    value = float(text)
  except ValueError:
    value = float("nan")
  if not 0 < value < float("inf"):
    raise argparse.ArgumentTypeError(
      f"must be a positive number or auto, got {text}"
    )
  return value


OTHERS = ("absent", "joint", "average")
VISUAL = (
  "modality",
  "labels",
  "others",
  "mode",
  "objective",
  "objective_scale",
  "parameterization",
  "fidelity",
  "transforms",
  "seeds",
  "num_steps",
  "controls",
  "seed",
)


def add_visual(command) -> None:
  """The options of ``visualize`` that say what is synthesised."""
  command.add_argument("--modality", required=True, help="what is synthesised")
  command.add_argument(
    "--label",
    dest="labels",
    type=labels,
    metavar="C,C,...",
    help="classes, such as 3 or 0,3,7, or all (default: the first ten)",
  )
  command.add_argument(
    "--others",
    type=others,
    default="absent",
    metavar="WHAT",
    help="the other modalities: absent (default); the number of an item of the "
    "split that is held fixed; average, over a few items; joint: all are "
    "synthesised",
  )
  command.add_argument(
    "--mode",
    default="expectation",
    choices=("expectation", "in_place"),
    help="expectation: the objective is averaged over transformations "
    "(default); in_place: the input itself is transformed as it goes",
  )
  command.add_argument(
    "--objective",
    choices=("margin", "logit", "log_prob"),
    help="margin: the class and no other (default)",
  )
  command.add_argument(
    "--objective-scale",
    type=scale,
    default="auto",
    metavar="S",
    help="the objective is divided by it; auto: by the mean margin of training "
    "items (default), so that regularisers weigh the same in every network",
  )
  command.add_argument(
    "--parameterization", default="pixels", choices=("pixels", "fourier")
  )
  command.add_argument(
    "--fidelity",
    default="corrected",
    choices=("corrected", "published"),
    help="published: our reconstruction of what was published (images)",
  )
  command.add_argument(
    "--transforms",
    choices=(
      *("depth", "identity", "image", "inertial", "log_mel", "lucid"),
      *("skeleton", "vector"),
    ),
    help="what keeps a class (default: by the modality)",
  )
  command.add_argument(
    "--seeds", type=count, default=3, help="inputs of every class (default: 3)"
  )
  command.add_argument(
    "--num-steps", type=count, help="of the ascent (default: 256; photos 512)"
  )
  command.add_argument(
    "--no-controls",
    dest="controls",
    action="store_false",
    help="leave out what is synthesised without transformations, with shifts "
    "only and the like",
  )
  command.add_argument(
    "--seed", type=whole, default=0, help="of all randomness"
  )


def visual_options(options) -> dict:
  """What was given of them, ``{name: value}``."""
  return {name: getattr(options, name) for name in VISUAL}


def like(text: str, old):
  """``text`` as a value of the type of ``old``, a key of a configuration."""
  if isinstance(old, str):
    return text
  value = literal(text)
  if isinstance(old, tuple) and isinstance(value, str):
    # left,right without quotes is what a shell user writes.
    value = tuple(text.split(","))
  if isinstance(old, tuple) and not isinstance(value, tuple):
    value = tuple(value) if isinstance(value, list) else (value,)
  if isinstance(old, float) and isinstance(value, int):
    value = value if isinstance(value, bool) else float(value)
  if old is not None and type(value) is not type(old):
    kind = type(old).__name__
    raise argparse.ArgumentTypeError(
      f"must be {_KINDS.get(kind, kind)}, got {text!r}"
    )
  return value


_KINDS = {
  "bool": "true or false",
  "int": "an integer",
  "float": "a number",
  "tuple": "a list such as 0.1,0.5",
}


def literal(text: str):
  """A Python literal, or the text itself."""
  lowered = {"true": "True", "false": "False", "none": "None"}
  try:
    return ast.literal_eval(lowered.get(text.lower(), text))
  except (ValueError, SyntaxError):
    return text
