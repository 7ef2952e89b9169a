"""What a save does when Orbax stumbles over folders of its own.

In a process of its own, which ends at once: a save that stumbled leaves Orbax's
threads waiting for minutes, and coroutines that a later test would pay for.
"""

import subprocess
import sys

_STUMBLES = """
import os, pathlib, sys
import jax.numpy as jnp
from robust_mm.training import checkpoints

folder, made = pathlib.Path(sys.argv[1]), os.makedirs
left = 0

def makedirs(path, *args, **kwargs):
  global left
  made(path, *args, **kwargs)
  if "state.orbax" in str(path) and left:
    left -= 1
    raise FileExistsError(17, "File exists", str(path))

os.makedirs = makedirs

try:
  store = checkpoints.Checkpoints(folder, keep=2)
  {code}
  sys.stdout.flush()
except BaseException as error:
  print(repr(error), file=sys.stderr, flush=True)
  os._exit(1)
os._exit(0)
"""


def _run(folder, *lines):
  code = _STUMBLES.replace("{code}", "\n  ".join(lines))
  return subprocess.run(
    [sys.executable, "-W", "ignore", "-c", code, folder],
    capture_output=True,
    text=True,
    check=False,
    timeout=120,
  )


def test_a_save_that_stumbles_is_tried_again(tmp_path):
  done = _run(
    tmp_path / "run",
    "store.save(1, {'a': jnp.ones(3)})",
    "left = 1",
    "store.save(2, {'a': 2 * jnp.ones(3)}, metrics={'loss': 0.5})",
    "print(left, store.latest_step, store.metrics())",
    "print(store.restore({'a': jnp.zeros(3)})['a'])",
    "store.save(3, {'a': 3 * jnp.ones(3)})",
    "store.close()",
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines() == ["0 2 {'loss': 0.5}", "[2. 2. 2.]"]
  assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["2", "3"]


def test_one_that_stumbles_for_ever_says_so(tmp_path):
  save = "store.save(1, {'a': jnp.ones(3)})"
  done = _run(tmp_path / "run", "left = 99", save)
  assert done.returncode == 1
  assert done.stderr.splitlines()[-1].startswith("FileExistsError")
