"""Sources of a radius: local constants, linear relaxation, the best of all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robust_mm as rmm
from robust_mm import attacks
from robust_mm import certification
from robust_mm import linalg
from robust_mm.models import encoders

ITEMS = slice(0, None, 9)
NETS = ("digits_plain", "mfeat_penalty0p01")


def reference_model(names):
  """The reference nets, with what their dense encoders state."""

  def embed(layers, x):
    for kernel, bias in layers:
      x = jax.nn.relu(x @ kernel + bias[None])
    return x

  def encode(params, state, inputs, present, *, train=False, key=None):
    del train, key
    return {
      m: jnp.where(
        present[m][:, None], embed(params["layers"][m], inputs[m]), 0
      )
      for m in names
    }, state

  def fuse(params, embeddings, present):
    del present
    scores = {m: embeddings[m] @ params["head"][m].T for m in names}
    logits = sum(scores.values()) + params["bias"][None]
    return rmm.Outputs(logits=logits, scores=scores, embeddings=embeddings)

  def geometry(params):
    layers = {
      m: tuple(kernel.T for kernel, _ in params["layers"][m]) for m in names
    }
    norms = {
      m: functools.reduce(jnp.multiply, map(linalg.gram_norm, layers[m]))
      for m in names
    }
    eye = jnp.eye(32)
    return rmm.Geometry(
      head=params["head"],
      bias=params["bias"],
      lipschitz=norms,
      chain={m: (*layers[m], eye) for m in names},
    )

  return rmm.Model(
    modalities=names,
    num_classes=10,
    init=lambda key: (None, {}),
    encode=encode,
    fuse=fuse,
    geometry=geometry,
  )


@pytest.fixture(scope="module", params=NETS)
def reference(request, shared_path):
  path = shared_path / f"reference/certificates/{request.param}.npz"
  with np.load(path, allow_pickle=False) as file:
    stored = dict(file)
  names = tuple(sorted(str(m) for m in stored["modalities"]))
  params = {
    "head": {
      m: jnp.asarray(stored[f"params/head/{m}/kernel"].T) for m in names
    },
    "bias": jnp.asarray(stored["params/head/bias"]),
    "layers": {
      m: [
        tuple(
          jnp.asarray(stored[f"params/{m}/dense_{i}/{part}"])
          for part in ("kernel", "bias")
        )
        for i in (0, 1)
      ]
      for m in names
    },
  }
  batch = {
    "inputs": {m: jnp.asarray(stored[f"inputs/{m}"][ITEMS]) for m in names}
  }
  model = reference_model(names)
  found = {
    source: rmm.certify(model, params, batch, source=source)
    for source in ("global", "local", "relaxation", "best")
  }
  return stored, model, params, batch, found


def test_every_source_equals_or_beats_its_reference(reference):
  stored, *_, found = reference
  columns = {"global": "eclipse_fast", "relaxation": "crown"}
  for source, column in columns.items():
    expected = stored[f"radius/{column}/joint"][ITEMS]
    radius = np.asarray(found[source].radius)
    np.testing.assert_allclose(radius, expected, rtol=3e-3, atol=1e-3)
  for column in ("product", "eclipse_fast", "ibp", "crown_ibp", "crown"):
    expected = stored[f"radius/{column}/joint"][ITEMS]
    assert np.all(found["best"].radius >= expected * (1 - 3e-3) - 1e-3)


def test_no_source_exceeds_a_known_attack(reference):
  stored, model, _, _, found = reference
  for certificate in found.values():
    assert certificate.sound
    upper = stored["upper/joint"][ITEMS]
    assert np.all(np.asarray(certificate.radius) <= upper)
    for m in model.modalities:
      upper = stored[f"upper/{m}"][ITEMS]
      assert np.all(np.asarray(certificate.modality_radius[m]) <= upper)
  # Local constants go on from the global ones.
  base = np.asarray(found["global"].radius)
  assert np.all(np.asarray(found["local"].radius) >= base * (1 - 1e-5))
  # Scaled up, the best radius is refuted: the test can fail.
  upper = stored["upper/joint"][ITEMS]
  assert np.any(2.5 * np.asarray(found["best"].radius) > upper)


def test_best_is_the_largest_and_names_its_source(reference):
  _, model, _, _, found = reference
  best = found["best"]
  assert best.sources == ("global", "local", "relaxation")
  candidates = np.stack([np.asarray(found[s].radius) for s in best.sources])
  # Bisections start from another first radius there.
  assert np.all(np.asarray(best.radius) >= candidates.max(0) * (1 - 1e-5))
  from_global = np.asarray(best.radius_source) == 0
  np.testing.assert_allclose(
    np.asarray(best.radius)[from_global], candidates[0][from_global], rtol=1e-6
  )
  for m in model.modalities:
    largest = np.max(
      [found[s].modality_radius[m] for s in best.sources], axis=0
    )
    assert np.all(np.asarray(best.modality_radius[m]) >= largest * (1 - 1e-5))


def test_covered_budgets_are_the_union_of_both_sets(reference):
  _, model, _, _, found = reference
  best, world = found["best"], found["global"]
  first = model.modalities[0]
  share = 0.999 / len(model.modalities) ** 0.5
  inside = {m: share * np.asarray(best.radius) for m in model.modalities}
  right = np.asarray(best.radius) > 0
  assert np.all(np.asarray(best.covers(inside))[right])
  outside = {m: 1.05 * value / 0.999 for m, value in inside.items()}
  beyond = np.asarray(best.covers(outside)) & ~np.asarray(world.covers(outside))
  assert not beyond.any()
  alone = {first: 0.999 * np.asarray(best.modality_radius[first])}
  assert np.all(np.asarray(best.covers(alone))[right])
  assert not np.any(best.covers({first: 1.001 * best.modality_radius[first]}))
  for ball, factor in (("linf", len(model.modalities) ** 0.5), ("l1", 1.0)):
    radius = np.asarray(best.joint_radius(ball))
    assert np.all(radius >= np.asarray(world.joint_radius(ball)))
    assert np.all(radius >= np.asarray(best.balls.joint) / factor * 0.99999)


def linear(scale=1.0):
  """A plain function whose radius is known."""
  matrix = jax.random.normal(jax.random.key(0), (9, 4))
  shapes = {"a": (2, 3), "b": (3,)}

  def fn(matrix, inputs):
    flat = [jnp.reshape(inputs[m], (inputs[m].shape[0], -1)) for m in shapes]
    return scale * jnp.concatenate(flat, axis=-1) @ matrix

  model = rmm.models.from_function(
    fn, matrix, num_classes=4, input_shapes=shapes
  )
  keys = jax.random.split(jax.random.key(1), 2)
  inputs = {
    m: jax.random.normal(k, (40, *shape))
    for k, (m, shape) in zip(keys, shapes.items())
  }
  return model, matrix, inputs


@pytest.mark.parametrize("source", ["local", "relaxation", "best"])
def test_plain_linear_function_is_certified_exactly(source):
  model, matrix, inputs = linear()
  units = {"a": 2.0, "b": 0.5}
  found = rmm.certify(
    model, matrix, {"inputs": inputs}, source=source, units=units
  )
  flat = np.concatenate(
    [np.reshape(inputs[m], (40, -1)) for m in ("a", "b")], axis=1
  )
  scale = np.repeat([2.0, 0.5], [6, 3])
  logits = flat @ np.asarray(matrix)
  y = logits.argmax(1)
  exact, worst = np.full(40, np.inf), np.zeros((40, 9))
  for j in range(4):
    rows = np.asarray(matrix).T[y] - np.asarray(matrix).T[j]
    with np.errstate(divide="ignore", invalid="ignore"):
      reach = (logits[np.arange(40), y] - logits[:, j]) / np.linalg.norm(
        rows * scale, axis=1
      )
    nearer = (y != j) & (reach < exact)
    exact = np.where(nearer, reach, exact)
    worst = np.where(nearer[:, None], rows, worst)
  assert np.all(np.asarray(found.radius) <= exact)
  tolerance = 0.35 if source == "local" else 2e-3  # a grid of radii
  np.testing.assert_allclose(found.radius, exact, rtol=tolerance)
  # 1.2 times the radius is refuted by the nearest point of the boundary.
  step = worst * scale**2
  step /= np.linalg.norm(step / scale, axis=1, keepdims=True)
  moved = flat - 1.2 * exact[:, None] * step
  assert np.all((moved @ np.asarray(matrix)).argmax(1) != y)
  assert found.fusion == "ball"
  total = sum(np.asarray(v) for v in found.vulnerability.values())
  np.testing.assert_allclose(total, 1, rtol=1e-5)


def test_frontier_of_a_ball_is_a_circle_within_the_radii_alone():
  model, matrix, inputs = linear()
  found = rmm.certify(model, matrix, {"inputs": inputs}, source="relaxation")
  grid = jnp.linspace(0, 2, 9)
  curve = np.asarray(found.frontier("a", "b", grid))
  radius = np.asarray(found.radius)[:, None]
  circle = np.sqrt(np.maximum(radius**2 - np.asarray(grid)[None] ** 2, 0))
  np.testing.assert_allclose(curve[:, 1:], circle[:, 1:], atol=1e-4)
  np.testing.assert_allclose(curve[:, 0], found.modality_radius["b"], rtol=1e-4)
  with pytest.raises(ValueError, match="additive"):
    found.covers({}, max_missing=1)


def test_absent_modalities_and_nan():
  model, matrix, inputs = linear()
  present = {"a": jnp.arange(40) % 2 == 0, "b": jnp.arange(40) % 3 != 0}
  batch = {"inputs": inputs, "present": present}
  found = rmm.certify(model, matrix, batch, source="relaxation")
  here = np.asarray(present["a"])
  assert np.all(np.isinf(np.asarray(found.modality_radius["a"])[~here]))
  nothing = ~here & ~np.asarray(present["b"])
  assert np.all(np.isinf(np.asarray(found.radius)[nothing]))
  assert not np.any(np.asarray(found.valid)[nothing])
  only_b = ~here & np.asarray(present["b"])
  np.testing.assert_allclose(
    np.asarray(found.radius)[only_b],
    np.asarray(found.modality_radius["b"])[only_b],
    rtol=1e-5,
  )
  bad = {**inputs, "a": inputs["a"].at[0, 0, 0].set(jnp.nan)}
  found = rmm.certify(model, matrix, {"inputs": bad}, source="relaxation")
  assert found.radius[0] == 0
  assert not found.covers({"a": 0.0})[0]
  assert np.all(np.asarray(found.radius)[1:] > 0)


def test_ordinary_convolutions_are_certified_and_no_attack_succeeds():
  model = rmm.models.concat_fusion(
    {"sound": encoders.temporal_cnn(features=(6, 6), embedding_dim=5)},
    num_classes=3,
    input_shapes={"sound": (12, 2)},
  )
  params, state = model.init(jax.random.key(0))
  inputs = {"sound": jax.random.normal(jax.random.key(1), (24, 12, 2))}
  batch = {"inputs": inputs}
  product = rmm.certify(model, params, batch, state=state)
  found = rmm.certify(model, params, batch, state=state, source="relaxation")
  assert found.sound
  # The product of the layers' norms is sound, and far below.
  finite = np.isfinite(found.radius)
  assert np.all(np.asarray(product.radius)[finite] > 0)
  assert np.all(2 * np.asarray(product.radius) < np.asarray(found.radius))
  present = {"sound": jnp.ones(24, bool)}
  logits_fn = attacks.logits_fn(model, params, state, present)
  attack = attacks.pgd(norm=2, budget=1.0, num_steps=40, num_restarts=2)

  @jax.jit
  def flipped(key, radius):
    moved = attack(key, logits_fn, inputs, found.prediction, budget=radius)
    return jnp.argmax(logits_fn(moved), -1) != found.prediction

  radius = jnp.where(jnp.isfinite(found.radius), found.radius, 0)
  assert not np.any(flipped(jax.random.key(2), 0.999 * radius))
  assert np.mean(flipped(jax.random.key(2), 2.5 * radius)) > 0.5


def test_dense_encoders_are_certified_by_their_chain():
  model = rmm.models.late_fusion(
    {"x": encoders.mlp(hidden_sizes=(16, 16), embedding_dim=8)},
    num_classes=4,
    input_shapes={"x": (6,)},
    normalization={
      "x": rmm.models.Normalization(np.zeros(6), np.linspace(0.5, 4, 6))
    },
  )
  params, _ = model.init(jax.random.key(3))
  geometry = model.geometry(params)
  chain = np.asarray(certification.pairwise_sensitivity(geometry)["x"])
  bare = certification.pairwise_sensitivity(
    rmm.Geometry(
      head=geometry.head, bias=geometry.bias, lipschitz=geometry.lipschitz
    )
  )
  off = ~np.eye(4, dtype=bool)
  assert np.all(chain <= np.asarray(bare["x"]))
  assert np.mean(chain[off] / np.asarray(bare["x"])[off]) < 0.9

  def logits(x):
    return model.apply(params, {}, {"x": x[None]}, {"x": jnp.ones(1, bool)})[
      0
    ].logits[0]

  xs = 3 * jax.random.normal(jax.random.key(4), (200, 6))
  slopes = jax.vmap(jax.jacrev(logits))(xs)
  steep = jnp.linalg.norm(slopes[:, :, None] - slopes[:, None], axis=-1)
  assert np.all(np.asarray(jnp.max(steep, 0)) <= chain + 1e-6)


def test_what_cannot_be_certified_is_told_the_ways_out():
  model = rmm.models.token_fusion(
    {"x": encoders.mlp()}, num_classes=3, input_shapes={"x": (4,)}
  )
  params, state = model.init(jax.random.key(0))
  batch = {"inputs": {"x": jnp.ones((2, 4))}}
  with pytest.raises(ValueError, match="smoothing"):
    rmm.certify(model, params, batch, state=state)
  with pytest.raises(ValueError, match="smoothing"):
    rmm.certify(model, params, batch, state=state, source="best")
  with pytest.raises(ValueError, match="fidelity"):
    rmm.certify(
      model, params, batch, state=state, source="best", fidelity="published"
    )
