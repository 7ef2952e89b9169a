"""What training the methods of a study costs, in numbers and sentences."""

from collections.abc import Sequence

from robust_mm import shift_methods

_HEAD = "updates of the head on all training examples"


def budgets(
  config, modalities: Sequence[str], train_sets: Sequence[tuple[str, ...]]
) -> dict[str, list[dict]]:
  """What every method of a study costs that trains, or takes several models.

  Args:
    config: of the study.
    modalities: all of the data.
    train_sets: T.

  Returns:
    ``{method: [{"sizes", "epochs", "steps", "batch_size", "relative_cost",
    "probe_steps", "models"}]}``, an entry for all T of which the rest is equal:
    how many modalities T may have; how long it trains (one of the two is 0,
    both where there is but a probe); labelled rows of an update; how many times
    the passes of plain fine-tuning an epoch, or a step, takes (these two None
    where there is none); updates of the head alone before that, each on all
    training examples; models of T. A pass forward and backward is 3, one
    without gradient 1.
  """
  found = {}
  for name in config.study.methods:
    entries = []
    for train in sorted(train_sets, key=len):
      entry = _entry(config, name, train, tuple(modalities))
      if entry is None:
        break
      same = [e for e in entries if {**e, "sizes": []} == entry]
      if not same:
        entries.append(entry)
      sizes = (same or [entry])[0]["sizes"]
      if len(train) not in sizes:
        sizes.append(len(train))
    if entries:
      found[name] = entries
  return found


def _entry(config, name: str, train, modalities) -> dict | None:
  method = shift_methods.METHODS[name]
  found = {
    **{"sizes": [], "epochs": 0, "steps": 0},
    **{"batch_size": None, "relative_cost": None},
  }
  if isinstance(method, shift_methods.Ensemble):
    return {**found, "probe_steps": 0, "models": len(train)}
  if shift_methods.is_derived(name):
    return None
  made = shift_methods.configured(config, name, train, modalities)
  asked = made.recipe.options
  way = asked.get("method", "lp_ft")
  if way != "probe":
    found["epochs"], found["steps"] = made.num_epochs, made.num_steps
    found["batch_size"] = made.data.batch_size
    cost = shift_methods.passes(made, len(modalities)) / 3
    if not made.num_epochs:  # an epoch has all rows, whatever the batches are
      cost *= made.data.batch_size / config.data.batch_size
    found["relative_cost"] = cost
  probed = asked.get("probe_steps", shift_methods.PROBE_STEPS)
  probed = 0 if way == "finetune" else probed
  return {**found, "probe_steps": probed, "models": 1}


def lines(config, modalities, train_sets) -> list[str]:
  """The same as sentences, one for each number of modalities that differs."""
  found = []
  for name, entries in budgets(config, modalities, train_sets).items():
    method = shift_methods.METHODS[name]
    if isinstance(method, shift_methods.Ensemble):
      most = max(entry["models"] for entry in entries)
      found.append(
        f"{name}: a model of {method.of} for every modality of T, up to {most} "
        f"times the training of one."
      )
      continue
    for entry in entries:
      of = ""
      if len(entries) > 1:
        sizes = ", ".join(map(str, entry["sizes"]))
        of = f", T of {sizes}"
      found.append(f"{name}{of}: {_said(entry, config.data.batch_size)}.")
      if method.oracle:
        found[-1] = f"{found[-1][:-1]}; one model for all T."
  return found


def _said(entry: dict, batch_size: int) -> str:
  parts = []
  if entry["probe_steps"]:
    parts.append(f"{entry['probe_steps']} {_HEAD}")
  number = entry["epochs"] or entry["steps"]
  if number:
    unit = "epoch" if entry["epochs"] else "step"
    rows = entry["batch_size"]
    smaller = "" if rows == batch_size else f" in batches of {rows}"
    parts.append(f"{number} {unit}{'' if number == 1 else 's'}{smaller}")
  said = ", then ".join(parts)
  times = entry["relative_cost"]
  if times is not None and abs(times - 1) >= 0.005:
    said += f"; each costs {times:.2f} times one of {shift_methods.REFERENCE}"
  return said
