"""Edge cases of a certificate: ties, nothing to attack, bad values."""

import certification_heads as heads
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_mm import certification


def test_ties_have_radius_zero_and_cover_nothing():
  found = heads.plain({"a": [[1.0, 1.0, 0.0]]}, {"a": heads.HOLLOW})
  assert found.radius[0] == 0
  assert found.modality_radius["a"][0] == 0
  assert not found.covers({})[0]


def test_nothing_to_attack_is_infinite():
  found = heads.plain({"a": [[2.0, 1.0, 0.0]]}, {"a": 0 * heads.HOLLOW})
  assert found.radius[0] == np.inf
  assert found.covers({"a": np.inf})[0]
  assert found.vulnerability["a"][0] == 0


def test_nothing_present_is_infinite_and_invalid():
  for bias in ([0.0, 0.0, 0.0], [0.0, 2.0, 1.0]):
    found = heads.plain(
      {"a": [[2.0, 1.0, 0.0]]},
      {"a": heads.HOLLOW},
      present={"a": np.array([False])},
      bias=np.asarray(bias),
    )
    assert found.prediction[0] == np.argmax(bias)
    assert found.radius[0] == np.inf
    assert not found.valid[0]
    assert found.covers({"a": 1.0}, max_missing=1)[0]
    assert found.nearest_class[0] != found.prediction[0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["logits", "tables"])
def test_non_finite_values_are_never_certified(bad, where):
  terms, table = np.array([[2.0, 1.0, 0.0]]), heads.HOLLOW.copy()
  if where == "logits":
    terms[0, 1] = bad
  else:
    table[0, 1] = bad
  found = heads.plain(
    {"a": terms, "b": [[1.0, 0.0, 0.0]]}, {"a": table, "b": heads.HOLLOW}
  )
  assert found.radius[0] == 0
  assert found.modality_radius["b"][0] == 0
  assert not found.covers({})[0]
  assert found.radius_without(["a"])[0] == 0
  assert found.valid[0]
  leaves = [x for x in jax.tree.leaves(found) if x.dtype.kind == "f"]
  assert not any(np.any(np.isnan(x)) for x in leaves)


@pytest.mark.parametrize("size", [1e30, 3e38, 1e-30])
def test_extreme_logits_give_no_nan(size):
  found = heads.plain(
    {"a": [[size, -size, 0.0]], "b": [[size, 0.0, -size]]},
    {"a": heads.HOLLOW, "b": heads.HOLLOW},
  )
  for leaf in jax.tree.leaves(found):
    assert not np.any(np.isnan(np.asarray(leaf, float)))
  for removed in (["a"], ["a", "b"]):
    assert not np.isnan(found.radius_without(removed)[0])
  assert not np.any(np.isnan(found.frontier("a", "b", jnp.array([0.0, 1.0]))))


@pytest.mark.parametrize(
  "call, match",
  [
    (lambda c: c.covers({"nose": 1.0}), "budgets names the unknown"),
    (lambda c: c.covers({"a": -1.0}), "budgets"),
    (lambda c: c.covers({"a": float("nan")}), "budgets"),
    (lambda c: c.covers({}, max_missing=2), "max_missing"),
    (lambda c: c.covers({}, max_missing=-1), "max_missing"),
    (lambda c: c.radius_without(["nose"]), "removed names the unknown"),
    (lambda c: c.joint_radius("l3"), "ball"),
    (lambda c: c.frontier("a", "nose", jnp.zeros(2)), "frontier"),
  ],
)
def test_bad_questions_are_refused_by_name(call, match):
  found = heads.plain({"a": [[2.0, 1.0, 0.0]]}, {"a": heads.HOLLOW})
  with pytest.raises(ValueError, match=match):
    call(found)


@pytest.mark.parametrize(
  "kwargs, match",
  [
    ({"units": {"a": 0.0}}, "units"),
    ({"units": {"nose": 1.0}}, "units"),
    ({"norm": "l7"}, "norm"),
    ({"norm": "linf"}, "sizes"),
    ({"fidelity": "rough"}, "fidelity"),
    ({"fusion": "late"}, "fusion"),
    ({"slack": certification.Slack(margin=-1.0)}, "slack"),
    ({"logits": jnp.zeros((1, 3), jnp.bfloat16)}, "bfloat16"),
  ],
)
def test_bad_settings_are_refused_by_name(kwargs, match):
  with pytest.raises(ValueError, match=match):
    heads.plain({"a": [[2.0, 1.0, 0.0]]}, {"a": heads.HOLLOW}, **kwargs)


def test_relative_units_by_name_point_to_the_helper():
  with pytest.raises(ValueError, match="relative_units"):
    heads.plain({"a": [[2.0, 1.0, 0.0]]}, {"a": heads.HOLLOW}, units="relative")
