"""A command line run inside the test's own process."""

from robust_mm import cli


def run(capsys, *arguments):
  """(exit code, standard output, standard error)."""
  try:
    code = cli.main(list(arguments))
  except SystemExit as stop:
    code = stop.code
  out = capsys.readouterr()
  return code, out.out, out.err


def without_constants(folder) -> str:
  """``--config=`` of a few steps with encoders that state no constants."""
  path = folder / "attending.py"
  path.write_text(
    "from robust_mm import config\n"
    "def get_config(argument):\n"
    "  found = config.load('configs/joint.py:digits,smoke')\n"
    "  with found.unlocked():\n"
    "    encoder = {'name': 'transformer', 'width': 8, 'num_layers': 1}\n"
    "    found.model.encoders = {'default': encoder}\n"
    "  return found\n"
  )
  return f"--config={path}"
