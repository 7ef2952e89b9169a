"""``robust-mm``: quickstart, train, evaluate, certify, report, data.

Parsing and what a user can get wrong are answered here without importing jax;
the work itself is in ``robust_mm.commands``. A user's mistake is one sentence
on standard error and exit code 2, never a traceback.
"""

import argparse
import os
import sys

from robust_mm import _validate
from robust_mm import arguments
from robust_mm import parsers


def main(argv: list[str] | None = None) -> int:
  """Runs a command line; returns the exit code."""
  # Threads of OpenBLAS that wait for work keep those of XLA from it: a step
  # with an eigendecomposition takes a quarter longer on two cores.
  os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
  words = sys.argv[1:] if argv is None else argv
  # Flags a shell user may write before or after the command name.
  words, overrides = take_overrides(words)
  parser = build_parser()
  options = parser.parse_args(words)
  if options.command in ("train", "shift"):
    options.overrides = overrides
  elif overrides:
    parser.error(f"{overrides[0]} is for robust-mm train and shift only")
  try:
    return options.run(options) or 0
  except (_validate.UserError, FloatingPointError) as error:
    print(f"robust-mm: {error}", file=sys.stderr)
    return 2 if isinstance(error, _validate.UserError) else 1
  except OSError as error:
    print(f"robust-mm: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    hint = "; with --resume the same command goes on"
    hint = hint if options.command == "certify" else ""
    print(f"robust-mm: interrupted{hint}", file=sys.stderr)
    return 130


def take_overrides(words: list[str]) -> tuple[list[str], list[str]]:
  rest, overrides, i = [], [], 0
  while i < len(words):
    word = words[i]
    if word.startswith("--config."):
      if "=" not in word and i + 1 < len(words):
        i += 1
        word = f"{word}={words[i]}"
      overrides.append(word)
    else:
      rest.append(word)
    i += 1
  return rest, overrides


def build_parser() -> argparse.ArgumentParser:
  """The parser of the whole command line."""
  return parsers.build(
    {
      "quickstart": _quickstart,
      "train": _train,
      "evaluate": _evaluate,
      "certify": _certify,
      "shift": _shift,
      "interpolate": _interpolate,
      "visualize": _visualize,
      "report": _report,
      "data list": _data_list,
      "data inspect": _data_inspect,
      "data prepare": _data_prepare,
    }
  )


def _quickstart(options):
  from robust_mm import commands

  return commands.quickstart(options.workdir, seed=options.seed)


def _train(options):
  from robust_mm import config as config_lib
  from robust_mm import preflight

  config = config_lib.load(options.config, options.overrides)
  if "study" in config:
    raise _validate.UserError(
      f"--config: {options.config} is a study: robust-mm shift runs it."
    )
  preflight.check(config, options.workdir)
  from robust_mm import commands

  return commands.train(
    config,
    options.workdir,
    device_count=options.device_count,
    distributed=options.distributed,
  )


def _evaluate(options):
  from robust_mm import preflight

  preflight.check_attack(options.attack)
  preflight.check_run(options.workdir, options.split)
  if options.surrogate is not None:
    preflight.check_surrogate(options.workdir, options.surrogate)
  for name in ("attack", "radius"):
    if getattr(options, name) is not None:
      preflight.check_classes(options.workdir, f"--{name}")
  from robust_mm import commands

  return commands.evaluate(
    options.workdir,
    split=options.split,
    phase=options.phase,
    radii=options.radius,
    attack=options.attack,
    limit=options.limit,
    surrogate=options.surrogate,
    device_count=options.device_count,
  )


def _certify(options):
  from robust_mm import preflight

  asked = {
    "budgets": tuple(options.budget),
    "max_missing": options.max_missing,
    "source": options.source,
    "fidelity": options.fidelity,
    "output": options.output,
  }
  smoothing = arguments.smoothing_options(options)
  preflight.check_smoothing(smoothing, options.norm, options.workdir, **asked)
  preflight.check_certify(options.workdir, options.split, **asked)
  from robust_mm import commands

  return commands.certify(
    options.workdir,
    **asked,
    smoothing=smoothing,
    radii=options.radius,
    norm=options.norm,
    units=options.units,
    split=options.split,
    phase=options.phase,
    limit=options.limit,
    resume=options.resume,
    device_count=options.device_count,
    distributed=options.distributed,
  )


def _shift(options):
  from robust_mm import config as config_lib
  from robust_mm import preflight

  config = config_lib.load(options.config, options.overrides)
  preflight.check_study(config, options.workdir)
  from robust_mm import commands

  return commands.shift(
    config, options.workdir, device_count=options.device_count
  )


def _interpolate(options):
  from robust_mm import preflight

  preflight.check_run(options.workdir, options.split)
  from robust_mm import commands

  return commands.interpolate(
    options.workdir,
    alphas=options.alpha,
    start=options.start,
    end=options.end,
    split=options.split,
    limit=options.limit,
    device_count=options.device_count,
  )


def _visualize(options):
  from robust_mm import preflight

  asked = arguments.visual_options(options)
  for name in ("ranges", "tuning", "transfer"):
    asked[name] = getattr(options, name)
  preflight.check_visualize(
    options.workdir, options.split, options.output, **asked
  )
  for folder in options.transfer:
    preflight.check_run(folder, argument="--transfer")
  from robust_mm import commands

  return commands.visualize(
    options.workdir,
    question=asked,
    split=options.split,
    phase=options.phase,
    output=options.output,
    device_count=options.device_count,
  )


def _report(options):
  from robust_mm import preflight

  workdirs = options.workdir.split(",")
  if not all(workdirs):
    raise _validate.UserError(
      f"--workdir: a folder's name is empty in {options.workdir!r}."
    )
  for workdir in workdirs:
    preflight.check_evaluated(workdir)
  if options.output:
    preflight.check_output(options.output)
  from robust_mm import commands

  return commands.report(workdirs, output=options.output)


def _data_list(options):
  from robust_mm import data

  print(data.format_list())


def _data_inspect(options):
  from robust_mm import data

  print(data.format_inspection(data.inspect(options.name, path=options.path)))


def _data_prepare(options):
  from robust_mm import data

  there = data.prepared.is_prepared(options.name, options.path)
  path = data.prepare(
    options.name,
    options.source,
    data_dir=options.path,
    overwrite=options.overwrite,
    beam=options.beam,
  )
  if there and not options.overwrite:
    print(
      f"{options.name} is prepared in {path} already; --source was not read "
      "(--overwrite makes it again)"
    )
  else:
    print(f"prepared {options.name} in {path}")


if __name__ == "__main__":
  sys.exit(main())
