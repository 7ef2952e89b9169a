"""Templates of the pages, set up alike."""

import functools

import jinja2


@functools.cache
def template(name: str) -> jinja2.Template:
  """A template of this package: escaped, and strict about its variables."""
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("robust_mm.evaluation"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  return environment.get_template(name)
