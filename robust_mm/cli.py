"""``robust-mm``: quickstart, train, evaluate, certify, report, data.

Parsing and what a user can get wrong are answered here without importing jax;
the work itself is in ``robust_mm.commands``. A user's mistake is one sentence
on standard error and exit code 2, never a traceback.
"""

import argparse
import os
import sys

from robust_mm import __version__
from robust_mm import _validate
from robust_mm import arguments

_EPILOG = """\
examples:
  robust-mm quickstart
  robust-mm train --config=configs/crmt.py:digits --workdir=runs/crmt
  robust-mm train --config=configs/crmt.py:digits,smoke --workdir=runs/smoke \\
      --config.optimizer.lr=3e-4
  robust-mm evaluate --workdir=runs/crmt
  robust-mm certify --workdir=runs/crmt --radius=0.25,0.5 --output=rows.csv
  robust-mm data list
"""


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
  if overrides and options.command != "train":
    parser.error(f"{overrides[0]} is for robust-mm train only.")
  if options.command == "train":
    options.overrides = overrides
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


class _Parser(argparse.ArgumentParser):
  """One sentence and exit code 2, with the closest option named."""

  def parse_known_args(self, args=None, namespace=None):
    # Before what is missing is named; a command's own options alone can be
    # meant, not those before it.
    known = self._option_string_actions
    for word in args or () if self._subparsers is None else ():
      name = word.partition("=")[0]
      if word.startswith("--") and not any(o.startswith(name) for o in known):
        close = _validate.suggestion(name, known)
        self.error(f"there is no option {name}{close and '.'}{close}")
    return super().parse_known_args(args, namespace)

  def error(self, message: str):
    see = " See" if message.endswith("?") else "; see"
    self.exit(2, f"{self.prog}: {message}{see} {self.prog} --help.\n")


def build_parser() -> argparse.ArgumentParser:
  """The parser of the whole command line."""
  parser = _Parser(
    prog="robust-mm",
    description=(
      "Train multimodal models that stay right when a modality is attacked, "
      "corrupted or missing, and certify how far they stay right."
    ),
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--version", action="version", version=__version__)
  commands = parser.add_subparsers(
    dest="command", required=True, metavar="COMMAND"
  )
  _add_quickstart(commands)
  _add_train(commands)
  _add_evaluate(commands)
  _add_certify(commands)
  _add_report(commands)
  _add_data(commands)
  return parser


def _command(commands, name: str, text: str, run):
  command = commands.add_parser(name, help=text, description=text)
  command.set_defaults(run=run)
  return command


def _add_quickstart(commands) -> None:
  command = _command(
    commands,
    "quickstart",
    "Train a joint baseline and a certified model on real digits, attack "
    "both, certify, and write a report; about a minute.",
    _quickstart,
  )
  command.add_argument("--workdir", default="runs/quickstart")
  command.add_argument("--seed", type=int, default=0)


def _add_train(commands) -> None:
  command = _command(
    commands,
    "train",
    "Train from a configuration; the same command resumes a stopped run.",
    _train,
  )
  command.add_argument(
    "--config",
    required=True,
    metavar="FILE.py:ARGUMENT",
    help="such as configs/crmt.py:digits or configs/joint.py:digits,smoke; "
    "change a key by --config.optimizer.lr=3e-4",
  )
  command.add_argument("--workdir", required=True, help="folder of the run")
  _add_devices(command)
  _add_distributed(command)


def _add_distributed(command) -> None:
  command.add_argument(
    "--distributed",
    action="store_true",
    help="join the other processes of this job first "
    "(jax.distributed.initialize; see launch/)",
  )


def _add_devices(command) -> None:
  command.add_argument(
    "--device-count",
    type=arguments.count,
    metavar="N",
    help="simulate N devices on the CPU",
  )


def _add_evaluate(commands) -> None:
  command = _command(
    commands,
    "evaluate",
    "Clean, missing, attacked and certified accuracy of a finished run, into "
    "results.json, examples.csv and report.html in its work directory.",
    _evaluate,
  )
  command.add_argument("--workdir", required=True)
  command.add_argument(
    "--split", default="test", choices=("train", "validation", "test")
  )
  command.add_argument("--phase", help="the phase whose model to take")
  command.add_argument(
    "--radius", type=arguments.radii, help="attack radii, such as 0.1,0.5"
  )
  command.add_argument(
    "--attack", help="in place of the configuration's; auto: the strongest"
  )
  command.add_argument(
    "--limit", type=arguments.count, help="at most so many examples"
  )
  _add_devices(command)


def _add_certify(commands) -> None:
  command = _command(
    commands,
    "certify",
    "What the certificates of a finished run say: radii of every example into "
    "a .csv file, and the share of examples that are right and stay right. "
    "The size of a change to one modality is its norm divided by the "
    "modality's unit.",
    _certify,
  )
  command.add_argument("--workdir", required=True)
  arguments.add_sizes(command)
  command.add_argument(
    "--source",
    choices=(
      *("global", "local", "relaxation", "best"),
      *("empirical", "smoothing"),
    ),
    help="global: Lipschitz constants that the encoders guarantee (default); "
    "local, relaxation: bounds inside a ball around each example, for ordinary "
    "encoders too; best: the largest radius of these; empirical: the largest "
    "slopes on training data, an estimate, no guarantee; smoothing: see below",
  )
  command.add_argument(
    "--fidelity",
    default="corrected",
    choices=("corrected", "published"),
    help="published: the formula as published, with estimated constants, a "
    "split denominator and the second-largest logit as the only rival; no "
    "guarantee, so its columns are called estimated_*",
  )
  command.add_argument(
    "--output",
    help="the .csv file (default: certificates.csv, or smoothed.csv, in the "
    "work directory)",
  )
  command.add_argument(
    "--split", default="test", choices=("train", "validation", "test")
  )
  command.add_argument("--phase", help="the phase whose model to take")
  command.add_argument(
    "--limit", type=arguments.count, help="at most so many examples"
  )
  command.add_argument(
    "--resume",
    action="store_true",
    help="go on where a stopped job was; the same command without it begins "
    "anew",
  )
  arguments.add_smoothing(command)
  _add_devices(command)
  _add_distributed(command)


def _add_report(commands) -> None:
  command = _command(
    commands,
    "report",
    "Draw the report of one or several evaluated runs again; computes nothing.",
    _report,
  )
  command.add_argument(
    "--workdir", required=True, help="one folder, or several: a,b,c"
  )
  command.add_argument(
    "--output",
    help="folder of the report, or one file that ends in .html "
    "(default: the first work directory)",
  )


def _add_data(commands) -> None:
  command = _command(commands, "data", "List, inspect, prepare data.", None)
  actions = command.add_subparsers(
    dest="action", required=True, metavar="ACTION"
  )
  listing = actions.add_parser("list", help="the data sets and their state")
  listing.set_defaults(run=_data_list)
  inspection = actions.add_parser(
    "inspect", help="shapes, ranges, classes, balance, share missing"
  )
  inspection.add_argument("name")
  inspection.add_argument("--path", help="folder of the data")
  inspection.set_defaults(run=_data_inspect)
  preparing = actions.add_parser("prepare", help="raw files -> records")
  preparing.add_argument("name")
  preparing.add_argument("--source", required=True, help="raw files")
  preparing.add_argument("--path", help="where to put the records")
  preparing.add_argument("--overwrite", action="store_true")
  preparing.add_argument(
    "--beam",
    type=arguments.words,
    nargs="?",
    const=[],
    metavar="OPTIONS",
    help="make the records of a large set in an Apache Beam pipeline (pip "
    "install 'robust_mm[beam]'), by default on this machine, else such as "
    "--beam='--runner=FlinkRunner --flink_master=HOST'",
  )
  preparing.set_defaults(run=_data_prepare)


def _quickstart(options):
  from robust_mm import commands

  return commands.quickstart(options.workdir, seed=options.seed)


def _train(options):
  from robust_mm import config as config_lib
  from robust_mm import preflight

  config = config_lib.load(options.config, options.overrides)
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

  path = data.prepare(
    options.name,
    options.source,
    data_dir=options.path,
    overwrite=options.overwrite,
    beam=options.beam,
  )
  print(f"prepared {options.name} in {path}")


if __name__ == "__main__":
  sys.exit(main())
