"""What a run keeps and stores, leaf by leaf."""

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

import robust_mm


def named(tree):
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def kept(workdir, phase=None):
  return named(robust_mm.load(workdir, phase=phase)[1])


def stored(workdir, step):
  """Everything in the rolling checkpoint of a step."""
  folder = workdir / "checkpoints" / "state" / str(step)
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
    ocp.metadata(folder, checkpointable_name="state").metadata,
  )
  return ocp.load(folder, abstract, checkpointable_name="state")


def assert_same(first, second):
  assert first.keys() == second.keys()
  for name, value in first.items():
    np.testing.assert_array_equal(value, second[name], err_msg=name)
