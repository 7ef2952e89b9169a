"""Configurations: the default tree, files, overrides, and what is refused.

A configuration is an ``ml_collections.ConfigDict`` made by ``get_config(arg)``
of a Python file, as in ``configs/crmt.py:av_digits,smoke``. Nothing below the
training loop's door sees one. jax is not imported here, so that a mistake is
answered at once.
"""

import argparse
import importlib.util
import pathlib
import re

import ml_collections

from robust_mm import _validate
from robust_mm import arguments
from robust_mm import config_checks

ATTACKS = config_checks.ATTACKS
CERTIFICATES = config_checks.CERTIFICATES
LINF_RADII = (0.01, 0.02, 0.05, 0.1, 0.2)


def default() -> ml_collections.ConfigDict:
  """Every key a run reads, with its default; config files fill in the rest."""
  config = ml_collections.ConfigDict()
  config.seed = 0
  # How long the recipe's first phase is: one of the two, the other is 0.
  config.num_steps = 1000
  config.num_epochs = 0  # passes over the training set
  # Work directory of a finished run of the same model to start from, and the
  # phase of it whose model to take; "" = from scratch, and the last phase.
  config.init_from = ""
  config.init_phase = ""

  config.data = ml_collections.ConfigDict()
  config.data.name = "digits"
  config.data.path = ""  # arrays: the folder; others: where they are prepared
  config.data.modalities = ()  # () = the data set's default modalities
  config.data.batch_size = 256
  # Modalities that training and selection see; evaluation has all of
  # data.modalities. () = all.
  config.data.labelled = ()
  # Splits whose examples, with all their modalities but without their labels,
  # are in every batch as well, and how many a labelled one. Of recipe "masd".
  config.data.unlabelled_splits = ()
  config.data.unlabelled_ratio = 1
  config.data.missing_rate = 0.0  # share of modality entries dropped for good
  # ("train", "validation") trains on both; then selection.metric is "last".
  config.data.train_splits = ("train",)
  config.data.max_train_examples = 0  # 0 = all
  config.data.max_eval_examples = 0

  # Random changes of training inputs, such as
  # {"image": {"move": {"shift": 0.1}, "noise": {"deviation": 0.05}}}.
  config.augmentation = ml_collections.ConfigDict()

  config.model = ml_collections.ConfigDict()
  config.model.fusion = "concat"
  config.model.fusion_options = ml_collections.ConfigDict()
  config.model.normalization = "standardize"
  # {modality: {"name": "mlp", ...}}; the key "default" serves the others.
  config.model.encoders = ml_collections.ConfigDict()

  config.recipe = ml_collections.ConfigDict()
  config.recipe.name = "joint"
  config.recipe.options = ml_collections.ConfigDict()

  # A penalty of wrong logits beside the cross-entropy of any recipe that has
  # one, by its name in robust_mm.losses; "" = none.
  config.penalty = ml_collections.ConfigDict()
  config.penalty.name = ""
  config.penalty.weight = 1.0
  config.penalty.on = "fused"  # or "scores", each modality's own
  # Share of the updates in which the weight rises; None: 0.05, 0 as published.
  config.penalty.ramp = None
  # Or "published": sums over a batch, for which the weight has to be smaller
  # and config.optimizer.clip_norm 0.
  config.penalty.fidelity = ""
  # Of its factory, such as {"window": (0, 4), "space": "log_prob"}.
  config.penalty.options = ml_collections.ConfigDict()

  config.optimizer = ml_collections.ConfigDict()
  config.optimizer.name = "adam"
  config.optimizer.lr = 1e-3
  config.optimizer.b1 = 0.9  # momentum of sgd and nesterov
  config.optimizer.b2 = 0.999  # unused by sgd and nesterov
  config.optimizer.schedule = "cosine"
  # Schedule "step": shares of the steps at which the rate drops, and by what.
  config.optimizer.milestones = ()
  config.optimizer.milestone_factor = 0.1
  config.optimizer.warmup_steps = 0
  config.optimizer.weight_decay = 0.0
  config.optimizer.clip_norm = 0.0  # 0 = no clipping

  config.training = ml_collections.ConfigDict()
  config.training.log_every = 50
  config.training.eval_every = 200
  config.training.checkpoint_every = 500
  config.training.keep_checkpoints = 2
  # Of a moving average that is validated, kept and handed on; 0 = none.
  config.training.average_decay = 0.0

  config.selection = ml_collections.ConfigDict()
  config.selection.metric = "auto"  # accuracy, mae, map or exact_match
  config.selection.radius = 0.0

  config.evaluation = ml_collections.ConfigDict()
  config.evaluation.units = "raw"  # or "relative"
  # Or "linf", of attacks, certificates, units and radii (LINF_RADII where none
  # are given). Selection and the radius r0 that recipes train for stay l2.
  config.evaluation.norm = "l2"
  config.evaluation.radii = (0.1, 0.25, 0.5, 0.75, 1.0)
  config.evaluation.attack = "pgd"  # "auto": the ensemble
  config.evaluation.loss = "margin"  # ignored by attacks without use for it
  config.evaluation.num_steps = 50
  config.evaluation.num_restarts = 5
  config.evaluation.num_queries = 1000  # of "square"
  config.evaluation.strength = 1  # of "auto"
  # Examples on which it is checked that gradients do not mislead, 20 at least
  # for an answer; 0 = no check.
  config.evaluation.masking_examples = 64
  # With a dozen more attacks: objectives, efforts, 5,000 queries; and points
  # made for another finished run, such as one of plain cross-entropy.
  config.evaluation.masking_thorough = False
  config.evaluation.surrogate = ""
  # Of captioners: the sentence attacks aim at, "" = the caption of the first
  # class; the share of its letters that is success; letters of a prompt that an
  # attack may change; steps and restarts of PGD, queries of random search.
  config.evaluation.captions = ml_collections.ConfigDict()
  config.evaluation.captions.target = ""
  config.evaluation.captions.threshold = 0.8
  config.evaluation.captions.num_substitutions = 1
  config.evaluation.captions.num_steps = 50
  config.evaluation.captions.num_restarts = 5
  config.evaluation.captions.num_queries = 200
  # Shares of absent modalities, such as (0.1, 0.3, 0.5, 0.7); () = no curve.
  config.evaluation.missing_rates = ()
  # Or "one_kept", "per_batch", "frames": see robust_mm.missing.
  config.evaluation.missing_protocol = "per_sample"
  # "suite": every kind and severity, one modality at a time; "together": all
  # modalities at once; "correlated": and where, when and how much they share.
  config.evaluation.corruptions = "none"
  config.evaluation.certificate = "auto"
  # Certificate "smoothing" only; train with the same noise.
  config.evaluation.smoothing = ml_collections.ConfigDict()
  config.evaluation.smoothing.sigma = 0.25  # in units; 0 = none
  # {modality: elements kept}; these have no Gaussian noise.
  config.evaluation.smoothing.keep = ml_collections.ConfigDict()
  config.evaluation.smoothing.num_selection = 100
  config.evaluation.smoothing.num_estimation = 1000
  config.evaluation.smoothing.chunk_size = 1000  # copies a pass, for memory
  config.evaluation.smoothing.alpha = 1e-3  # for each example
  # Multiples of each example's own radius at which it is attacked; () = none.
  config.evaluation.tightness = (1.0, 1.2, 1.5, 2.0, 3.0)
  config.evaluation.batch_size = 512
  # Whether inputs are synthesised that activate each class; of classifiers.
  config.evaluation.visualize = False

  config.mesh = ml_collections.ConfigDict()
  config.mesh.data = -1  # -1 = all devices that are left
  config.mesh.model = 1
  # ((regex of a parameter path, (mesh axis or None, one per dimension)), ...)
  config.mesh.rules = ()
  return config


def study() -> ml_collections.ConfigDict:
  """What ``robust-mm shift`` reads beside a run's own configuration."""
  config = ml_collections.ConfigDict()
  config.seeds = 3
  config.methods = ("finetune",)  # names of robust_mm.shift_methods
  # Sets such as "audio+image"; () = all, of at most four modalities.
  config.train_sets = ()
  config.test_sets = ()
  config.pretraining = ""  # FILE.py:ARGUMENT that all start from; "" = none
  config.options = ml_collections.ConfigDict()  # {method: recipe.options}
  # How a method pays for what an update passes beside those of fine-tuning:
  # "epochs", it has fewer, or fewer steps; "batch", smaller batches in these
  # epochs, so that it has as many updates.
  config.equal_cost = "epochs"
  config.alpha = 0.5  # of weights between the probe and what follows it
  config.num_samples = 2000  # replicates of the bootstrap
  # accuracy, balanced_accuracy or macro_f1; map or auroc of several labels.
  config.score = "auto"
  # Metadata whose equals are drawn together, such as "speaker"; "" = items.
  config.cluster = ""
  return config


def parse(
  argument: str,
  *,
  datasets: tuple[str, ...],
  flags: tuple[str, ...],
  apart: tuple[tuple[str, ...], ...] = (),
) -> tuple[str, frozenset[str]]:
  """``"av_digits,smoke"`` -> ``("av_digits", {"smoke"})``, for get_config.

  Args:
    argument: words between commas.
    datasets: known data sets, the first one where none is named.
    flags: known variants.
    apart: groups of flags of which at most one makes sense.

  Raises:
    UserError: a word that is neither one of ``datasets`` nor of ``flags``, or
      two of a group that is ``apart``.
  """
  words = [word for word in argument.split(",") if word] or [datasets[0]]
  for word in words:
    if word not in (*datasets, *flags):
      raise _validate.UserError(
        f"--config: {word!r} is unknown to this file; it knows the data sets "
        f"{', '.join(datasets)} and the variants {', '.join(flags)}."
        f"{_validate.suggestion(word, (*datasets, *flags))}"
      )
  named = [word for word in words if word in datasets]
  if len(named) > 1:
    raise _validate.UserError(
      f"--config names more than one data set: {', '.join(named)}."
    )
  for group in apart:
    both = [flag for flag in group if flag in words]
    if len(both) > 1:
      raise _validate.UserError(
        f"--config: the variants {both[0]} and {both[1]} exclude each other; "
        f"leave one of them out."
      )
  dataset = named[0] if named else datasets[0]
  return dataset, frozenset(words) - {dataset}


def refuse_idle(
  dataset: str, variants: frozenset[str], idle: tuple[str, ...]
) -> None:
  """UserError for the first of the variants that change nothing on a set."""
  for variant in idle:
    if variant in variants:
      raise _validate.UserError(
        f"--config: the variant {variant} changes nothing on {dataset}; leave "
        f"it out."
      )


def find(spec: str) -> tuple[pathlib.Path, str | None]:
  """``FILE.py:ARGUMENT`` -> an existing file and the argument.

  A path that is not below the working directory is looked up among the
  configurations that come with the package, with or without ``configs/``.
  """
  match = re.fullmatch(r"(.*?\.py)(?::(.*))?", spec)
  if not match:
    raise _validate.UserError(
      f"--config must name a Python file, as in configs/crmt.py:digits; "
      f"got {spec!r}."
    )
  path, argument = pathlib.Path(match[1]), match[2]
  if path.is_file():
    return path.resolve(), argument
  shipped = shipped_folder()
  candidate = shipped / path.name
  relative = path.parent in (pathlib.Path(), pathlib.Path("configs"))
  if relative and candidate.is_file():
    return candidate, argument
  names = sorted(p.name for p in shipped.glob("*.py") if p.name[0] != "_")
  raise _validate.UserError(
    f"--config names {match[1]}, which is no file here and none that comes "
    f"with robust_mm ({', '.join(names)})."
    f"{_validate.suggestion(path.name, names)}"
  )


def shipped_folder() -> pathlib.Path:
  """Where the configurations that come with the package lie."""
  package = pathlib.Path(__file__).resolve().parent
  inside = package / "configs"
  return inside if inside.is_dir() else package.parent / "configs"


def load(spec: str, overrides: list[str] = ()) -> ml_collections.ConfigDict:
  """The locked configuration of ``FILE.py:ARGUMENT`` with overrides applied.

  Args:
    spec: ``configs/crmt.py:digits,smoke``.
    overrides: ``["--config.optimizer.lr=3e-4", ...]``.

  Raises:
    UserError: unknown file, argument, key or value, naming it.
  """
  path, argument = find(spec)
  module_spec = importlib.util.spec_from_file_location(
    f"_robust_mm_config_{path.stem}", path
  )
  module = importlib.util.module_from_spec(module_spec)
  try:
    module_spec.loader.exec_module(module)
  except (ImportError, SyntaxError) as error:
    raise _validate.UserError(f"{path} cannot be read: {error}.") from error
  if not hasattr(module, "get_config"):
    raise _validate.UserError(f"{path} has no function get_config(arg).")
  try:
    config = module.get_config(argument or "")
  except _validate.UserError:
    raise
  except Exception as error:  # whatever a user's own file does wrong
    raise _validate.UserError(
      f"get_config of {path} fails: {type(error).__name__}: {error}"
    ) from error
  config.lock()
  before = getattr(config.get("evaluation"), "norm", None)
  for override in overrides:
    _apply(config, override)
  check(config)
  given = any(o.startswith("--config.evaluation.radii=") for o in overrides)
  if config.evaluation.norm == "linf" and not given:
    # Radii of a file that says linf itself are meant; others are l2 sizes.
    default_radii = default().evaluation.radii
    if before != "linf" or config.evaluation.radii == default_radii:
      config.evaluation.radii = LINF_RADII
  return config


def _apply(config: ml_collections.ConfigDict, override: str) -> None:
  match = re.fullmatch(r"--config\.([\w.\-]+)=(.*)", override, re.DOTALL)
  if not match:
    raise _validate.UserError(
      f"unknown argument {override!r}; overrides look like --config.key=value."
    )
  key, text = match.groups()
  node, parts = config, key.split(".")
  for depth, part in enumerate(parts):
    group = f"config.{'.'.join(parts[:depth])}"
    inside = isinstance(node, ml_collections.ConfigDict)
    new = inside and part not in node
    if new and group.startswith(_FREE) and depth == len(parts) - 1:
      # An option the file leaves at the factory's default.
      with node.unlocked():
        node[part] = arguments.literal(text)
      return
    if new and group.startswith(_NESTED):
      with node.unlocked():
        node[part] = ml_collections.ConfigDict()  # such as gate_options.tau
    if not inside or part not in node:
      known = list(node) if inside else []
      raise _validate.UserError(
        f"--config.{key}: there is no key {'.'.join(parts[: depth + 1])!r}"
        f"{'; known here: ' + ', '.join(known) if known else ''}."
        f"{_validate.suggestion(part, known)}"
      )
    parent, node = node, node[part]
  if isinstance(node, ml_collections.ConfigDict):
    raise _validate.UserError(
      f"--config.{key} is a group of keys ({', '.join(node)}), not a value."
    )
  try:
    value = arguments.like(text, node)
  except argparse.ArgumentTypeError as error:
    raise _validate.UserError(f"--config.{key} {error}.") from error
  with parent.unlocked():
    parent[parts[-1]] = value


def check(config: ml_collections.ConfigDict) -> None:
  """Refuses a configuration by the name of the key that is wrong.

  Raises:
    UserError: one sentence.
  """
  known = default()
  if "study" in config:
    known.study = study()
  with _validate.user_errors():
    _same_keys(known, config, "config")
    config_checks.check(config)


# Groups whose keys are the keyword arguments of a factory.
_FREE = (
  "config.augmentation",
  "config.model.encoders",
  "config.model.fusion_options",
  "config.penalty.options",
  "config.recipe.options",
  "config.evaluation.smoothing.keep",
  "config.study.options",
)
_NESTED = ("config.recipe.options", "config.study.options")


def _same_keys(reference, config, path: str) -> None:
  if path in _FREE:
    return
  for key in config:
    if key not in reference:
      raise _validate.UserError(
        f"{path}.{key} is no known key; known here: {', '.join(reference)}."
        f"{_validate.suggestion(key, reference)}"
      )
  for key, value in reference.items():
    if key not in config:
      raise _validate.UserError(f"{path}.{key} is missing.")
    if isinstance(value, ml_collections.ConfigDict):
      _same_keys(value, config[key], f"{path}.{key}")
