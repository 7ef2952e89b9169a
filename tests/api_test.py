"""The public API: every name is there, documented, and loads lazily."""

import inspect
import subprocess
import sys

import pytest

import robust_mm


@pytest.mark.parametrize("name", robust_mm.__all__)
def test_public_name_exists_and_is_documented(name):
  value = getattr(robust_mm, name)
  assert inspect.getdoc(value)


def test_unknown_name_is_an_attribute_error():
  with pytest.raises(AttributeError, match="no_such_name"):
    robust_mm.no_such_name  # noqa: B018


def _run(code):
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  return done.stdout.strip()


def test_import_loads_no_heavy_library():
  code = (
    "import sys, robust_mm;"
    "print([m for m in ('jax', 'flax', 'grain', 'orbax', 'sklearn',"
    " 'tensorflow_datasets', 'matplotlib') if m in sys.modules])"
  )
  assert _run(code) == "[]"


def test_certify_initialises_no_device_backend_on_import():
  code = (
    "import robust_mm; robust_mm.certify; robust_mm.attacks.pgd;"
    "from jax._src import xla_bridge; import sys;"
    "print(xla_bridge.backends_are_initialized(), 'flax' in sys.modules)"
  )
  assert _run(code) == "False False"


def test_command_line_help_loads_no_jax():
  code = (
    "import sys\nfrom robust_mm import cli\n"
    "try: cli.main(['--help'])\nexcept SystemExit as e: pass\n"
    "print('jax' in sys.modules)"
  )
  assert _run(code).endswith("False")
