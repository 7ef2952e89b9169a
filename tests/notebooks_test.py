"""Every notebook runs from its first cell to its last."""

import json
import pathlib

import matplotlib.pyplot as plt
import pytest

NOTEBOOKS = sorted(
  (pathlib.Path(__file__).resolve().parents[1] / "colab").glob("*.ipynb")
)


def test_there_are_notebooks():
  assert NOTEBOOKS


# A notebook is for users, whose JAX promotes ranks and whose Agg cannot show.
@pytest.mark.filterwarnings("ignore:.*non-interactive:UserWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path):
  import jax

  cells = json.loads(path.read_text())["cells"]
  assert all(not cell.get("outputs") for cell in cells), "outputs are stored"
  scope = {"__name__": "__notebook__"}
  with jax.numpy_rank_promotion("allow"):
    for number, cell in enumerate(cells):
      if cell["cell_type"] == "code":
        code = compile(
          "".join(cell["source"]), f"{path.name}[{number}]", "exec"
        )
        exec(code, scope)
  plt.close("all")
