"""The options of every command, as one parser."""

import argparse
from collections.abc import Callable
from collections.abc import Mapping

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


def build(handlers: Mapping[str, Callable]) -> argparse.ArgumentParser:
  """The parser of the whole command line.

  Args:
    handlers: ``{command: what runs with the parsed options}``; those of
      ``data`` are called "data list" and so on.
  """
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
  _add_quickstart(commands, handlers["quickstart"])
  _add_train(commands, handlers["train"])
  _add_evaluate(commands, handlers["evaluate"])
  _add_certify(commands, handlers["certify"])
  _add_shift(commands, handlers["shift"])
  _add_interpolate(commands, handlers["interpolate"])
  _add_visualize(commands, handlers["visualize"])
  _add_report(commands, handlers["report"])
  _add_data(commands, handlers)
  return parser


def _command(commands, name: str, text: str, run):
  command = commands.add_parser(name, help=text, description=text)
  command.set_defaults(run=run)
  return command


def _add_quickstart(commands, run) -> None:
  command = _command(
    commands,
    "quickstart",
    "Train a joint baseline and a certified model on real digits, attack "
    "both, certify, and write a report; about a minute.",
    run,
  )
  command.add_argument("--workdir", default="runs/quickstart")
  command.add_argument("--seed", type=int, default=0)


def _add_train(commands, run) -> None:
  command = _command(
    commands,
    "train",
    "Train from a configuration; the same command resumes a stopped run.",
    run,
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


def _add_evaluate(commands, run) -> None:
  command = _command(
    commands,
    "evaluate",
    "Clean, missing, attacked and certified accuracy of a finished run, into "
    "results.json, examples.csv and report.html in its work directory.",
    run,
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
  command.add_argument(
    "--surrogate",
    metavar="WORKDIR",
    help="a finished run, such as one of plain cross-entropy from another "
    "seed, whose adversarial points are tried as well (where the "
    "configuration has evaluation.masking_thorough)",
  )
  _add_devices(command)


def _add_certify(commands, run) -> None:
  command = _command(
    commands,
    "certify",
    "What the certificates of a finished run say: radii of every example into "
    "a .csv file, and the share of examples that are right and stay right. "
    "The size of a change to one modality is its norm divided by the "
    "modality's unit.",
    run,
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


def _add_shift(commands, run) -> None:
  command = _command(
    commands,
    "shift",
    "Train on every set of modalities T and evaluate on every set E, with "
    "every method of a study; into shift.html, shift.txt, shift.json and "
    "plots/ in the work directory. The same command goes on where it stopped.",
    run,
  )
  command.add_argument(
    "--config",
    required=True,
    metavar="FILE.py:ARGUMENT",
    help="such as configs/shift.py:utd_mhad; change a key by "
    "--config.study.seeds=5",
  )
  command.add_argument("--workdir", required=True, help="folder of the study")
  _add_devices(command)


def _add_interpolate(commands, run) -> None:
  command = _command(
    commands,
    "interpolate",
    "Evaluate the models between those of two phases of a finished run "
    "(WiSE-FT), with every set of modalities, and choose one on validation "
    "examples with the modalities that were trained on; into "
    "interpolation.json and plots/interpolation.png.",
    run,
  )
  command.add_argument("--workdir", required=True)
  command.add_argument(
    "--alpha",
    type=arguments.path,
    default=arguments.path("0:1:0.1"),
    metavar="FROM:TO:STEP",
    help="points of the path, such as 0:1:0.1 (default) or 0,0.5,1",
  )
  command.add_argument(
    "--start", help="the phase of the model at 0 (default: the first)"
  )
  command.add_argument(
    "--end", help="the phase of the model at 1 (default: the last)"
  )
  command.add_argument(
    "--split", default="test", choices=("train", "validation", "test")
  )
  command.add_argument(
    "--limit", type=arguments.count, help="at most so many examples"
  )
  _add_devices(command)


def _add_visualize(commands, run) -> None:
  command = _command(
    commands,
    "visualize",
    "Synthesise inputs of one modality that activate classes of a finished "
    "run, under transformations that keep a class; beside controls and real "
    "items, with numbers. Into visualization/NAME.png, .json and .npz, a NAME "
    "for each question, split and phase, and visualization.html in the work "
    "directory, and into the report of an evaluated run.",
    run,
  )
  command.add_argument("--workdir", required=True)
  arguments.add_visual(command)
  command.add_argument(
    "--ranges",
    type=_pairs,
    default=(),
    metavar="NAME=VALUE,...",
    help="of the transformations, such as rotation=30,scale=0.8:1.25,jitter=3 "
    "(default: by the modality and its size)",
  )
  command.add_argument(
    "--tuning",
    type=_pairs,
    default=(),
    metavar="NAME=VALUE,...",
    help="of the ascent: learning_rate, num_transforms, tv_weight, l2_weight, "
    "annealing, blur_every, num_held_out; step_size and every in place",
  )
  command.add_argument(
    "--transfer",
    type=lambda text: tuple(text.split(",")),
    default=(),
    metavar="WORKDIR,...",
    help="other runs that judge what is made: scores of the network that made "
    "a picture are a circle",
  )
  command.add_argument(
    "--split",
    default="test",
    choices=("train", "validation", "test"),
    help="of real items (default: test)",
  )
  command.add_argument("--phase", help="the phase whose model to take")
  command.add_argument(
    "--output", help="another .png file for the grid; reports do not show it"
  )
  _add_devices(command)


def _pairs(text: str) -> tuple:
  """``a=1,b=0.8:1.2`` as ``(("a", 1.0), ("b", (0.8, 1.2)))``."""
  found = {}
  for pair in text.split(","):
    name, _, value = pair.partition("=")
    try:
      numbers = tuple(float(part) for part in value.split(":"))
    except ValueError:
      numbers = ()
    if not name or len(numbers) not in (1, 2) or name in found:
      raise argparse.ArgumentTypeError(
        f"must be NAME=VALUE or NAME=LEAST:LARGEST, each name once, got {text}"
      )
    found[name] = numbers[0] if len(numbers) == 1 else numbers
  return tuple(found.items())


def _add_report(commands, run) -> None:
  command = _command(
    commands,
    "report",
    "Draw the report of one or several evaluated runs again; computes nothing.",
    run,
  )
  command.add_argument(
    "--workdir", required=True, help="one folder, or several: a,b,c"
  )
  command.add_argument(
    "--output",
    help="folder of the report, or one file that ends in .html "
    "(default: the first work directory)",
  )


def _add_data(commands, handlers) -> None:
  command = _command(commands, "data", "List, inspect, prepare data.", None)
  actions = command.add_subparsers(
    dest="action", required=True, metavar="ACTION"
  )
  listing = actions.add_parser("list", help="the data sets and their state")
  listing.set_defaults(run=handlers["data list"])
  inspection = actions.add_parser(
    "inspect", help="shapes, ranges, classes, balance, share missing"
  )
  inspection.add_argument("name")
  inspection.add_argument("--path", help="folder of the data")
  inspection.set_defaults(run=handlers["data inspect"])
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
  preparing.set_defaults(run=handlers["data prepare"])
