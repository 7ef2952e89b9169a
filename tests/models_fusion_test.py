import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_mm import linalg
from robust_mm.models import fusion

DIMS = {"second": 12, "first": 9}


def _batch(seed=0, size=6):
  rng = np.random.default_rng(seed)
  embeddings = {
    name: jnp.asarray(rng.normal(size=(size, dim)), jnp.float32)
    for name, dim in DIMS.items()
  }
  present = {name: jnp.ones(size, bool) for name in DIMS}
  return embeddings, present


def _reference(shared_path):
  path = shared_path / "reference" / "crmt_head" / "head.npz"
  return dict(np.load(path, allow_pickle=False))


@pytest.mark.parametrize(
  "variant,options",
  [
    ("uncentred", {}),
    ("row_centred", {"centre_rows": True}),
    ("rowwise", {"centre_rows": True, "orthogonality": "rowwise"}),
  ],
)
def test_rows_and_logits_equal_the_reference_head(
  shared_path, variant, options
):
  reference = _reference(shared_path)
  names = ("first", "second")
  head = fusion.OrthogonalFusion(
    10, integration="softplus", use_bias=True, **options
  )
  factors = np.stack([reference[f"factors/{name}"] for name in names])
  params = {
    "proxy": {
      name: jnp.asarray(reference[f"proxy/{name}"], jnp.float32)
      for name in names
    },
    "integration": {"alpha": jnp.asarray(np.log(np.expm1(factors)), "float32")},
    "bias": jnp.asarray(reference["bias"], jnp.float32),
  }
  embeddings = {
    name: jnp.asarray(reference[f"embeddings/{name}"], jnp.float32)
    for name in names
  }
  present = {name: jnp.ones(256, bool) for name in names}
  for name, row in head.rows(params).items():
    expected = reference[f"rows/{variant}/{name}"]
    np.testing.assert_allclose(row, expected, atol=1e-5)
  outputs = head(params, embeddings, present)
  logits = reference[f"{variant}/logits"]
  np.testing.assert_allclose(outputs.logits, logits, rtol=1e-5, atol=1e-5)


def test_polar_rows_are_orthonormal_and_rowwise_ones_are_not():
  rng = np.random.default_rng(0)
  proxy = {
    name: jnp.asarray(rng.normal(size=(7, dim)), jnp.float32)
    for name, dim in DIMS.items()
  }
  polar = fusion.OrthogonalFusion(7, num_iters=20)
  rowwise = fusion.OrthogonalFusion(7, orthogonality="rowwise")
  for name in DIMS:
    assert polar.defect({"proxy": proxy})[name] < 1e-5
    assert rowwise.defect({"proxy": proxy})[name] > 0.1
    row = rowwise.rows({"proxy": proxy})[name]
    np.testing.assert_allclose(jnp.linalg.norm(row, axis=1), 1.0, rtol=1e-5)


def test_proxies_of_one_size_are_orthonormalised_as_alone():
  rng = np.random.default_rng(0)
  proxy = {
    name: jnp.asarray(rng.normal(size=(4, 9)), jnp.float32)
    for name in ("b", "a")
  }
  rows = fusion.OrthogonalFusion(4).rows({"proxy": proxy})
  for name, value in proxy.items():
    np.testing.assert_allclose(
      rows[name], linalg.newton_schulz(value), atol=1e-6
    )


def test_centred_rows_ignore_a_constant_feature():
  head = fusion.OrthogonalFusion(4, centre_rows=True)
  params = head.init(jax.random.key(0), DIMS)
  embeddings, present = _batch()
  shifted = {name: value + 3.0 for name, value in embeddings.items()}
  np.testing.assert_allclose(
    head(params, embeddings, present).logits,
    head(params, shifted, present).logits,
    atol=1e-4,
  )


@pytest.mark.parametrize("integration", ["simplex", "softplus"])
@pytest.mark.parametrize("initial", [0.1, 1.0])
def test_factors_start_where_asked(integration, initial):
  head = fusion.OrthogonalFusion(
    4, integration=integration, integration_init=initial
  )
  params = head.init(jax.random.key(0), DIMS)
  for factor in head.factors(params).values():
    np.testing.assert_allclose(factor, initial, rtol=1e-5)


def test_simplex_keeps_the_mean_factor_and_has_no_gradient_along_it():
  head = fusion.OrthogonalFusion(4)
  params = head.init(jax.random.key(0), DIMS)
  alpha = 3 * jax.random.normal(jax.random.key(1), (2, 4))
  params["integration"]["alpha"] = alpha
  mean = jnp.mean(jnp.stack(list(head.factors(params).values())))
  np.testing.assert_allclose(mean, 1.0, atol=1e-6)
  embeddings, present = _batch()

  def loss(shift):
    moved = {**params, "integration": {"alpha": alpha + shift}}
    return jnp.sum(jnp.sin(head(moved, embeddings, present).logits))

  assert abs(jax.jit(jax.grad(loss))(0.0)) < 1e-5
  # Softplus factors do scale, so the claim can fail.
  head = fusion.OrthogonalFusion(4, integration="softplus")
  assert abs(jax.jit(jax.grad(loss))(0.0)) > 1e-2


HEADS = [
  fusion.OrthogonalFusion(4),
  fusion.OrthogonalFusion(4, use_bias=True, integration="softplus"),
  fusion.OrthogonalFusion(4, orthogonality="rowwise"),
  fusion.ConcatFusion(4),
]


@pytest.mark.parametrize("head", HEADS)
def test_logits_are_the_sum_that_the_geometry_states(head):
  params = head.init(jax.random.key(0), DIMS)
  keys = jax.random.split(jax.random.key(1), 64)
  leaves, structure = jax.tree.flatten(params)
  params = jax.tree.unflatten(
    structure,
    [a + jax.random.normal(key, a.shape) for a, key in zip(leaves, keys)],
  )
  embeddings, present = _batch()
  present["first"] = jnp.arange(6) % 2 == 0
  outputs = head(params, embeddings, present)
  geometry = head.geometry(params, {"first": None, "second": jnp.ones(())})
  expected = geometry.bias[None] + sum(
    jnp.where(present[name][:, None], embeddings[name] @ rows.T, 0.0)
    for name, rows in geometry.head.items()
  )
  np.testing.assert_allclose(outputs.logits, expected, rtol=1e-5, atol=1e-5)
  for name, factor in (geometry.factors or {}).items():
    rows = geometry.head[name] / factor[:, None]
    assert jnp.linalg.norm(rows, 2) <= 1 + 1e-6
    recombined = outputs.scores[name] * factor[None]
    term = jnp.where(
      present[name][:, None], embeddings[name] @ geometry.head[name].T, 0.0
    )
    np.testing.assert_allclose(recombined, term, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", [*HEADS, fusion.TokenFusion(4, width=8)])
def test_absent_embeddings_have_no_influence(head):
  params = head.init(jax.random.key(0), DIMS)
  embeddings, present = _batch()
  present["first"] = jnp.arange(6) % 2 == 0
  poisoned = {
    **embeddings,
    "first": jnp.where(present["first"][:, None], embeddings["first"], jnp.nan),
  }
  logits = jax.jit(lambda p, e: head(p, e, present).logits)
  np.testing.assert_array_equal(
    logits(params, embeddings), logits(params, poisoned)
  )
  gradient = jax.jit(jax.grad(lambda e: jnp.sum(logits(params, e) ** 2)))
  gradient = gradient(poisoned)["first"]
  assert jnp.all(gradient[1::2] == 0)
  assert jnp.all(jnp.isfinite(gradient))
  assert jnp.any(gradient[0] != 0)


@pytest.mark.parametrize("head", [*HEADS[:2], HEADS[3]])
def test_absent_modality_equals_the_model_built_without_it(head):
  params = head.init(jax.random.key(0), DIMS)
  embeddings, present = _batch()
  present["first"] = jnp.zeros(6, bool)
  params_alone = dict(params)
  for group in ("proxy", "head"):
    if group in params:
      params_alone[group] = {"second": params[group]["second"]}
  logits = head(params, embeddings, present).logits
  if "integration" in params:
    geometry = head.geometry(params, {"first": None, "second": None})
    rows, bias = geometry.head["second"], geometry.bias
    expected = embeddings["second"] @ rows.T + bias[None]
  else:
    expected = head(
      params_alone,
      {"second": embeddings["second"]},
      {"second": present["second"]},
    ).logits
  np.testing.assert_allclose(logits, expected, atol=1e-6)


def test_token_fusion_makes_no_claim():
  head = fusion.TokenFusion(4, width=8)
  embeddings, present = _batch()
  outputs = head(head.init(jax.random.key(0), DIMS), embeddings, present)
  assert outputs.scores is None
  assert outputs.mixed
  assert not hasattr(head, "geometry")
  nothing = {name: jnp.zeros(6, bool) for name in DIMS}
  logits = head(head.init(jax.random.key(0), DIMS), embeddings, nothing).logits
  assert jnp.all(jnp.isfinite(logits))


def test_head_defect_reads_a_geometry():
  head = fusion.OrthogonalFusion(4)
  params = head.init(jax.random.key(0), DIMS)
  params["proxy"]["first"] = params["proxy"]["first"].at[0].set(0.0)
  geometry = head.geometry(params, {"first": None, "second": None})
  defect = fusion.head_defect(geometry)
  assert defect["first"] == 1
  assert defect["second"] < 1e-5
  assert head.defect({"fusion": params})["first"] == 1
  concat = fusion.ConcatFusion(4)
  geometry = concat.geometry(
    concat.init(jax.random.key(0), DIMS), {"first": None, "second": None}
  )
  assert fusion.head_defect(geometry) == {}


def test_rowwise_geometry_has_factors_but_allows_no_closed_form():
  """Equal unit rows have norm sqrt(2) > 1: the closed form would be unsound."""
  head = fusion.OrthogonalFusion(4, orthogonality="rowwise")
  params = head.init(jax.random.key(0), DIMS)
  proxy = params["proxy"]["first"]
  params["proxy"]["first"] = proxy.at[1].set(proxy[0])
  geometry = head.geometry(params, {"first": None, "second": None})
  assert geometry.factors is None
  rows = geometry.head["first"] / geometry.integration["first"][:, None]
  np.testing.assert_allclose(jnp.linalg.norm(rows, 2), 2**0.5, rtol=1e-5)
  defect = fusion.head_defect(geometry)
  np.testing.assert_allclose(defect["first"], 1, rtol=1e-5)
  polar = fusion.OrthogonalFusion(4)
  geometry = polar.geometry(params, {"first": None, "second": None})
  assert geometry.factors is geometry.integration


def test_gradient_of_a_proxy_is_orthogonal_to_it():
  head = fusion.OrthogonalFusion(4)
  params = head.init(jax.random.key(0), DIMS)
  params["proxy"] = jax.tree.map(
    lambda z: z + 0.3 * jax.random.normal(jax.random.key(3), z.shape),
    params["proxy"],
  )
  embeddings, present = _batch()

  @jax.jit
  @jax.grad
  def gradient(params):
    return jnp.sum(jnp.sin(head(params, embeddings, present).logits))

  for name, value in gradient(params)["proxy"].items():
    assert abs(jnp.vdot(value, params["proxy"][name])) < 1e-5


@pytest.mark.parametrize(
  "options,message",
  [
    ({"num_classes": 10}, "embedding_dim of modality 'first'"),
    ({"num_classes": 9, "centre_rows": True}, "embedding_dim"),
    ({"num_classes": 4, "num_iters": 0}, "num_iters"),
    ({"num_classes": 4, "integration": "simplx"}, "Did you mean 'simplex'"),
    ({"num_classes": 4, "orthogonality": "qr"}, "orthogonality"),
    ({"num_classes": 4, "integration_init": 0.0}, "integration_init"),
    ({"num_classes": 1}, "num_classes"),
  ],
)
def test_bad_arguments_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    fusion.OrthogonalFusion(**options).init(jax.random.key(0), DIMS)
  fusion.OrthogonalFusion(9).init(jax.random.key(0), DIMS)
