"""The floors: who may import whom, and which library is known where."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "robust_mm"

# A module imports only from lower floors; a package may import itself.
FLOORS = {
  "_convolutions": 0,
  "_extremes": 0,
  "_files": 0,
  "_compiling": 1,
  "_lazy": 0,
  "_tasks": -1,
  "_types": 0,
  "_validate": 0,
  "arguments": 0,
  "linalg": 1,
  "modalities": 1,
  "curvature": 2,
  "lipschitz": 2,
  "margins": 2,
  "missing": 2,
  "relaxation": 2,
  "spectrum": 2,
  "attacks": 3,
  "certification": 3,
  "controllers": 3,
  "corruptions": 3,
  "distillation": 3,
  "hypergrad": 3,
  "losses": 3,
  "masking": 3,
  "smoothing": 3,
  "weights": 3,
  "augmentations": 4,
  "data": 4,
  "models": 4,
  "nullspace": 4,
  "config_checks": 5,
  "config_variants": 5,
  "recipes": 5,
  "visualization": 5,
  "config": 6,
  "evaluation": 6,
  "training": 7,
  "preflight": 8,
  "unfinished": 1,
  "certificate_rows": 8,
  "parsers": 1,
  "protocols": 8,
  "shift_derived": 6,
  "shift_methods": 7,
  "shift_study": 8,
  "visualize_job": 8,
  "weight_paths": 8,
  "smoothed_rows": 8,
  "commands": 9,
  "cli": 10,
}
# Packages whose own modules come in an order have none here: cycles are
# refused for all by test_no_import_cycle.
EVERYWHERE = {"jax", "numpy", "optax", "jaxtyping", "robust_mm"}
# Where else a third-party library may be known (by path below the package).
ALLOWED = {
  "flax": ("models",),
  "grain": ("data",),
  "apache_beam": ("data",),
  "array_record": ("data",),
  "tensorflow_datasets": ("data",),
  "sklearn": ("data", "evaluation"),
  "scipy": ("data", "certification", "lipschitz.py", "smoothing"),
  "orbax": ("training/checkpoints.py",),
  "tensorboardX": ("training/writers.py",),
  "ml_collections": (
    "config.py",
    "config_checks.py",
    "config_variants.py",
    "commands.py",
    "preflight.py",
    "shift_methods.py",
    "training/context.py",
    "training/loading.py",
    "training/loop.py",
    "training/recipe.py",
    "training/runs.py",
    "training/setup.py",
    "training/units.py",
  ),
  "matplotlib": ("evaluation",),
  "jinja2": ("evaluation",),
  "tqdm": ("commands.py", "data", "evaluation"),
}
LOW = 3  # floors that know jax, optax, jaxtyping and numpy only


def _files():
  return sorted(
    path
    for path in PACKAGE.rglob("*.py")
    if "configs" not in path.relative_to(PACKAGE).parts
  )


def _imports(path):
  """(module, line) of every import of a file, functions included."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield alias.name, node.lineno
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}:{node.lineno} imports relatively"
      for alias in node.names:
        full = f"{node.module}.{alias.name}"
        yield full, node.lineno


def _room(path):
  relative = path.relative_to(PACKAGE)
  return relative.parts[0].removesuffix(".py")


def _target(module):
  parts = module.split(".")
  return parts[1] if parts[0] == "robust_mm" and len(parts) > 1 else None


@pytest.mark.parametrize(
  "path", _files(), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_module_imports_only_from_floors_below(path):
  room = _room(path)
  if room == "__init__":
    rooms = {_target(m) for m, _ in _imports(path)} - {None}
    assert rooms <= {"_lazy"}
    return
  assert room in FLOORS, f"{room} has no floor; add it to FLOORS."
  for module, line in _imports(path):
    target = _target(module)
    if target is None or target == room or target == "__version__":
      continue
    assert FLOORS[target] < FLOORS[room] or (room, target) in SAME_FLOOR, (
      f"{path.name}:{line}: {room} (floor {FLOORS[room]}) imports {target} "
      f"(floor {FLOORS[target]})"
    )


# The command line's helpers know each other's floor-mates by design.
SAME_FLOOR = set()


@pytest.mark.parametrize(
  "path", _files(), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_third_party_libraries_are_known_only_where_designed(path):
  relative = path.relative_to(PACKAGE).as_posix()
  floor = FLOORS.get(_room(path), 0)
  stdlib = __import__("sys").stdlib_module_names
  for module, line in _imports(path):
    top = module.split(".")[0]
    if top in stdlib or top in EVERYWHERE:
      continue
    assert top in ALLOWED, f"{relative}:{line} imports the unknown {top}"
    assert any(
      relative == place or relative.startswith(f"{place}/")
      for place in ALLOWED[top]
    ), f"{relative}:{line} imports {top}"
    assert floor > LOW or top == "scipy", f"{relative}:{line} imports {top}"


def test_no_import_cycle():
  graph = {}
  names = {}
  for path in _files():
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    names[".".join(parts).removesuffix(".__init__")] = path
  for name, path in names.items():
    tree = ast.parse(path.read_text())
    graph[name] = set()
    for node in tree.body:  # imports inside functions close no cycle
      if isinstance(node, ast.ImportFrom):
        for alias in node.names:
          full = f"{node.module}.{alias.name}"
          target = full if full in names else node.module
          if target in names and target != name:
            graph[name].add(target)
  done, active = set(), []

  def visit(name):
    if name in done:
      return
    assert name not in active, f"cycle: {[*active[active.index(name) :], name]}"
    active.append(name)
    for target in sorted(graph[name]):
      visit(target)
    active.pop()
    done.add(name)

  for name in sorted(graph):
    visit(name)


@pytest.mark.parametrize(
  "path", _files(), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_no_file_is_two_rooms_and_none_bears_a_verb_of_the_api(path):
  assert len(path.read_text().splitlines()) <= 450
  assert path.stem not in {"certify", "evaluate"}
