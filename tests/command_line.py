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
