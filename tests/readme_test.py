"""The blocks of README.md run, and the commands it names parse."""

import pathlib
import re
import shlex

import jax.numpy as jnp
import numpy as np
import pytest

from robust_mm import cli
from robust_mm import config as config_lib

README = pathlib.Path(__file__).resolve().parents[1] / "README.md"


def blocks(language):
  return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def test_python_blocks_run_one_after_the_other():
  namespace = {}
  found = blocks("python")
  assert found
  for block in found:
    exec(compile(block, "README.md", "exec"), namespace)
  assert namespace["certificate"].sound
  assert namespace["adversarial"]["left"].shape == (64, 8, 4, 1)
  # d/dp |a - w(p)|^2 with w = b / (1 + e^p) in closed form.
  w = namespace["weights"]
  slope = -2 * ((jnp.array([1.5, -0.5]) - w) * -w / 2).sum()
  np.testing.assert_allclose(namespace["gradient"], slope, rtol=1e-4)


def commands():
  text = "\n".join(blocks("sh")).replace("\\\n", " ")
  for line in text.splitlines():
    for part in re.split(r"&&|;", line):
      words = shlex.split(part.strip())
      if words and words[0].endswith("robust-mm"):
        yield words[1:]


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_every_command_of_the_readme_parses(words):
  rest, overrides = cli.take_overrides(words)
  options = cli.build_parser().parse_args(rest)
  if options.command in ("train", "shift"):
    config_lib.load(options.config, overrides)


def test_readme_names_every_command_and_data_set():
  from robust_mm import data

  text = README.read_text()
  for name in (*data.list_datasets(),):
    assert name.split("/")[0] in text
  for name in (
    *("quickstart", "train", "evaluate", "certify", "report", "data"),
    *("shift", "interpolate", "visualize"),
  ):
    assert f"robust-mm {name}" in text
