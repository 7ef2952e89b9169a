"""Shared fixtures: strict rank promotion, fake devices, the real data sets."""

import functools
import gc
import os
import pathlib
import tempfile

os.environ.setdefault("MPLBACKEND", "Agg")
# Tests count on eight devices, which a CPU can play. JAX_PLATFORMS=cuda runs
# them on a GPU instead; with one alone those of eight devices fail.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Many tests compile the same functions; they, all workers and the commands they
# start share the results.
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(
  tempfile.gettempdir(), f"robust-mm-jit-{os.getuid()}"
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
# Where a line of a program comes from costs a fifth of compiling it.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

import jax
import pytest
import small_data
from jax._src import compiler

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# CI names the folder, and then it must be there; elsewhere its tests skip.
SHARED_VARIABLE = "ROBUST_MM_SHARED"


# Every compiled function maps memory; a process that reaches the kernel's limit
# (vm.max_map_count, 65530 by default) dies of a segmentation fault.
MAPS = pathlib.Path("/proc/self/maps")
MOST_MAPS = 15_000


# First words of the files whose time goes into compiling. (Not all are there:
# some tests compare two programs to the last bit.)
QUICKLY = (
  "attacks_",
  "benchmarks_",
  "certificate_rows_",
  "certification_",
  "cli_",
  "commands_",
  "configs_",
  "corruptions_mixtures_",
  "end_to_end_",
  "evaluation_masking_",
  "evaluation_numbers_",
  "evaluation_tables_",
  "evaluation_thorough_",
  "masd_runs_",
  "notebooks_",
  "recipes_",
  "shift_killed_",
  "shift_methods_",
  "shift_study_",
  "smoothed_rows_",
  "smoothing_certify_",
  "training_averaging_",
  "training_jobs_",
  "training_selection_",
  "training_starts_",
  "training_test",
  "visualization_benchmarks_",
  "visualization_checks_",
  "visualize_job_",
)
FEW_OPTIMIZATIONS = "jax_disable_most_optimizations"
# Most of the time that is left goes into loops that are written by MLIR.
QUICK_FLAGS = {
  "xla_cpu_use_fusion_emitters": False,
  "xla_cpu_parallel_codegen_split_count": 1,
}
GIVEN_FLAGS = os.environ.get("XLA_FLAGS", "")


@functools.cache
def _quick_flags() -> dict:
  """Those flags, where this XLA knows them: it dies of what it does not."""
  try:
    jax.jit(lambda: 0, compiler_options=QUICK_FLAGS)()
  except Exception:
    return {}
  return QUICK_FLAGS


_compile_options = compiler.get_compile_options


def _options_of_this_file(*args, **kwargs):
  options = _compile_options(*args, **kwargs)
  if jax.config.read(FEW_OPTIMIZATIONS):
    options.env_option_overrides += list(_quick_flags().items())
  return options


# Flags are read once a process, and files differ.
compiler.get_compile_options = _options_of_this_file


@pytest.fixture(scope="module", autouse=True)
def _optimizations(request):
  """Compiles quickly in files that are named above, else as users do."""
  quickly = jax.default_backend() == "cpu"
  quickly = quickly and request.path.name.startswith(QUICKLY)
  if quickly != jax.config.read(FEW_OPTIMIZATIONS):
    flags = _quick_flags()
    # Nothing that was compiled the other way goes on.
    jax.clear_caches()
    jax.config.update(FEW_OPTIMIZATIONS, quickly)
    # For the commands that tests start.
    os.environ[FEW_OPTIMIZATIONS.upper()] = str(int(quickly))
    words = (f"--{name}={int(value)}" for name, value in flags.items())
    quick = " ".join((GIVEN_FLAGS, *words))
    os.environ["XLA_FLAGS"] = quick if quickly else GIVEN_FLAGS


@pytest.fixture(scope="module", autouse=True)
def _few_maps():
  """Gives compiled functions up, between files, when there are very many."""
  yield
  if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def shared_path() -> pathlib.Path:
  """The folder with real data sets and reference values; skips without it."""
  named = os.environ.get(SHARED_VARIABLE)
  path = pathlib.Path(
    named or pathlib.Path(__file__).resolve().parents[2] / "shared"
  )
  if not path.is_dir():
    if named:
      pytest.fail(f"{SHARED_VARIABLE} names {path}, which is not a folder.")
    pytest.skip("the shared data folder is not on this machine")
  return path


@pytest.fixture(scope="session")
def _prepared(shared_path, tmp_path_factory, worker_id):
  root = tmp_path_factory.getbasetemp()
  # Workers of pytest-xdist have base folders beside each other.
  root = root if worker_id == "master" else root.parent
  return small_data.prepare_all(shared_path, root / "prepared")


@pytest.fixture(scope="session")
def raw_av_digits(_prepared) -> pathlib.Path:
  """A few hundred real pairs of av_digits in the form of the raw files."""
  return _prepared / "raw"


@pytest.fixture(scope="session")
def data_dir(_prepared) -> pathlib.Path:
  """Where every data set is prepared; read-only."""
  return _prepared / "data"
