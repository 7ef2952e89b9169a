"""Values on the command line: parsed, or refused in one sentence."""

import argparse


def count(text: str) -> int:
  """An integer of at least 1."""
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
  return int(text)


def whole(text: str) -> int:
  """An integer of at least 0."""
  if not text.isdecimal():
    raise argparse.ArgumentTypeError(f"must be 0, 1, 2, ..., got {text}")
  return int(text)


def budget(text: str) -> dict[str, float]:
  """``left=0.3,right=inf`` as ``{modality: size}``."""
  sizes = {}
  for part in text.split(","):
    name, _, number = part.rpartition("=")
    try:
      size = float(number)
    except ValueError:
      size = float("nan")
    if not name or name in sizes or not size >= 0:
      raise argparse.ArgumentTypeError(
        f"must be a number of at least 0 for each modality, such as "
        f"left=0.3,right=0.1; got {text}"
      )
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
