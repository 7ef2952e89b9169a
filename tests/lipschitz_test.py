import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from robust_mm import lipschitz


def _random(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _materialised_norm(function, shape):
  """Largest singular value of the Jacobian of a linear map, in float64."""
  jacobian = jax.jacrev(lambda x: jnp.ravel(function(x)))(jnp.zeros(shape))
  matrix = np.asarray(jacobian, np.float64).reshape(jacobian.shape[0], -1)
  return np.linalg.norm(matrix, 2)


@pytest.mark.parametrize("method", ["gram", "svd", "schur", "frobenius"])
def test_dense_norms_are_upper_bounds(method):
  W = _random(0, 9, 5)
  exact = np.linalg.norm(W.astype(np.float64), 2)
  bound = lipschitz.dense_norm(W, method=method)
  assert bound >= exact * (1 - 1e-6)
  if method in ("gram", "svd"):
    np.testing.assert_allclose(bound, exact, rtol=1e-4)
  transposed = lipschitz.dense_norm(W.T, method=method)
  np.testing.assert_allclose(bound, transposed, rtol=1e-5)


def test_svd_is_refused_under_jit():
  norm = jax.jit(lambda w: lipschitz.dense_norm(w, method="svd"))
  with pytest.raises(ValueError, match="under jit"):
    norm(jnp.eye(2))


CONVS = [
  # input size, kernel size, stride, dilation, groups, padding
  (8, 3, 1, 1, 1, "SAME"),
  (3, 3, 1, 1, 1, "SAME"),
  (5, 4, 1, 1, 1, "VALID"),
  (6, 3, 2, 1, 1, "SAME"),
  (7, 3, 2, 1, 1, "SAME"),
  (7, 3, 3, 1, 1, ((1, 0), (2, 3))),
  (8, 2, 3, 1, 1, "VALID"),
  (9, 3, 2, 2, 2, "SAME"),
  (7, 5, 2, 1, 2, "VALID"),
  (6, 3, 1, 2, 1, "SAME"),
  (5, 2, 1, 2, 2, "SAME"),
  (4, 1, 1, 1, 1, "SAME"),
  (4, 3, 1, 1, 1, ((2, 2), (2, 2))),
]


@pytest.mark.parametrize("size,kernel,stride,dilation,groups,padding", CONVS)
def test_conv_norms_bound_the_materialised_operator(
  size, kernel, stride, dilation, groups, padding
):
  K = jnp.asarray(_random(size, kernel, kernel, 2, 4))

  def convolve(x):
    return jax.lax.conv_general_dilated(
      x[None],
      K,
      (stride, stride),
      padding,
      rhs_dilation=(dilation, dilation),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=groups,
    )

  exact = _materialised_norm(convolve, (size, size, 2 * groups))
  norm = functools.partial(
    lipschitz.conv_norm, K, (size, size), groups=groups, dilation=dilation
  )
  fine = norm(stride=stride)
  assert exact * (1 - 1e-6) <= fine <= norm() * (1 + 1e-5)
  assert norm() <= lipschitz.conv_norm(K, groups=groups) * (1 + 1e-5)
  if groups == dilation == 1:
    matrix = lipschitz.conv_matrix(K, stride=stride)
    cheap = np.linalg.norm(np.asarray(matrix, np.float64), 2)
    assert cheap >= fine * (1 - 1e-5)
    # Patches that do not overlap: the norm itself, where one fits.
    if stride >= kernel:
      np.testing.assert_allclose(cheap, exact, rtol=1e-5)
  if stride == 1 and padding == "SAME" and size > 3:
    assert fine <= 1.5 * exact


def test_conv_norm_of_a_stride_is_tight_on_large_maps():
  K = jnp.asarray(_random(0, 3, 3, 2, 4))
  convolve = lambda x: jax.lax.conv_general_dilated(  # noqa: E731
    x[None], K, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  exact = _materialised_norm(convolve, (24, 24, 2))
  assert exact <= lipschitz.conv_norm(K, (24, 24), stride=2) <= 1.01 * exact
  # What is left out with the other three quarters of the outputs.
  assert lipschitz.conv_norm(K, (24, 24)) > 1.3 * exact


def test_temporal_conv_norm_bounds_the_materialised_operator():
  K = jnp.asarray(_random(0, 5, 3, 2))
  function = lambda x: jax.lax.conv_general_dilated(  # noqa: E731
    x[None], K, (1,), "SAME", dimension_numbers=("NTC", "TIO", "NTC")
  )
  exact = _materialised_norm(function, (7, 3))
  bound = lipschitz.conv_norm(K, (7,))
  assert exact <= bound <= 1.2 * exact
  loss = lambda k: lipschitz.conv_norm(k, (7,), num_iters=6)  # noqa: E731
  gradient = jax.jit(jax.grad(loss))(K)
  assert jnp.all(jnp.isfinite(gradient))


def test_the_circular_norm_is_no_bound_for_zero_padding():
  """Frequencies of the map's own size miss it on some small maps."""
  size, count = 3, 0
  for seed in range(40):
    K = _random(seed, 3, 3, 1, 1)
    circular = np.max(np.abs(np.fft.fft2(K[:, :, 0, 0], s=(size, size))))
    convolve = lambda x, K=K: jax.lax.conv_general_dilated(  # noqa: E731
      x[None], K, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    exact = _materialised_norm(convolve, (size, size, 1))
    assert lipschitz.conv_norm(jnp.asarray(K), (size, size)) >= exact * (
      1 - 1e-6
    )
    count += circular < 0.999 * exact
  assert count > 0


@pytest.mark.parametrize("window,stride", [(2, 2), (3, 2), (3, 1), (2, 3)])
def test_average_pooling_bounds_the_materialised_operator(window, stride):
  pool = lambda x: nnx.avg_pool(  # noqa: E731
    x[None], (window,) * 2, strides=(stride,) * 2
  )
  exact = _materialised_norm(pool, (9, 9, 1))
  bound = lipschitz.average_pool((window,) * 2, (stride,) * 2)
  assert exact <= bound * (1 + 1e-6)
  if window <= stride:
    np.testing.assert_allclose(bound, exact, rtol=1e-5)


@pytest.mark.parametrize("window,stride", [(2, 2), (3, 2), (3, 1)])
def test_max_pooling_bounds_every_jacobian(window, stride):
  pool = lambda x: jnp.ravel(  # noqa: E731
    nnx.max_pool(x[None], (window,) * 2, strides=(stride,) * 2)
  )
  bound = lipschitz.max_pool((window,) * 2, (stride,) * 2)
  jacobian = jax.jit(jax.jacrev(pool))
  norms = []
  for seed in range(5):
    J = jacobian(_random(seed, 7, 7, 1)).reshape(-1, 49)
    norms.append(np.linalg.norm(J, 2))
  assert max(norms) <= bound * (1 + 1e-6)
  # One peak inside every window that covers it attains the bound.
  peak = jnp.zeros((7, 7, 1)).at[2, 2].set(1.0)
  attained = np.linalg.norm(pool(peak) - pool(0 * peak))
  np.testing.assert_allclose(attained, bound, rtol=1e-6)


def test_mean_pooling_is_exact():
  exact = _materialised_norm(lambda x: jnp.mean(x, axis=0), (9, 2))
  np.testing.assert_allclose(lipschitz.mean_pool(9), exact, rtol=1e-6)


ACTIVATIONS = {
  "abs": jnp.abs,
  "elu": nnx.elu,
  "gelu": nnx.gelu,
  "hardtanh": nnx.hard_tanh,
  "identity": lambda x: x,
  "leaky_relu": nnx.leaky_relu,
  "mish": lambda x: x * jnp.tanh(nnx.softplus(x)),
  "relu": nnx.relu,
  "sigmoid": nnx.sigmoid,
  "silu": nnx.silu,
  "softplus": nnx.softplus,
  "tanh": jnp.tanh,
}


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activation_slopes_are_bounds_and_tight_to_one_percent(name):
  x = jnp.linspace(-12, 12, 20001)
  slope = jax.vmap(jax.grad(ACTIVATIONS[name]))(x)
  largest = float(jnp.max(jnp.abs(slope)))
  bound = lipschitz.activation(name)
  assert largest <= bound + 1e-6
  assert bound <= 1.01 * largest


def test_tanh_form_of_gelu_has_the_same_bound():
  x = jnp.linspace(-12, 12, 20001)
  for approximate in (True, False):
    gelu = functools.partial(nnx.gelu, approximate=approximate)
    slope = jax.vmap(jax.grad(gelu))(x)
    assert jnp.max(jnp.abs(slope)) <= lipschitz.activation("gelu")


def test_unknown_activation_is_refused_by_name():
  with pytest.raises(ValueError, match="Did you mean 'relu'"):
    lipschitz.activation("relus")


def test_normalisation_constants():
  assert lipschitz.normalization(np.array([0.5, -0.1, 2.0])) == 10.0
  assert lipschitz.normalization(0.0) == np.inf
  scale, variance = jnp.array([1.0, -3.0]), jnp.array([4.0, 1.0])
  batch_norm = lipschitz.batch_norm(scale, variance, epsilon=0.0)
  np.testing.assert_allclose(batch_norm, 3.0, rtol=1e-6)
  layer_norm = lipschitz.layer_norm(scale, epsilon=1e-5)
  np.testing.assert_allclose(layer_norm, 3 * 316.2278, rtol=1e-6)


def test_composition_rules_bound_random_linear_maps():
  A, B = _random(0, 5, 5), _random(1, 5, 5)
  norm = lambda M: np.linalg.norm(M, 2)  # noqa: E731
  a, b = float(norm(A)), float(norm(B))
  zero = np.zeros((5, 5))
  rules = [
    (lipschitz.compose(a, b), A @ B),
    (lipschitz.add(a, b), A + B),
    (lipschitz.residual(a), np.eye(5) + A),
    (lipschitz.concatenate(a, b), np.concatenate([A, B])),
    (lipschitz.parallel(a, b), np.block([[A, zero], [zero, B]])),
  ]
  for bound, matrix in rules:
    assert norm(matrix) <= bound * (1 + 1e-6)
  # Each is attained by some pair of maps.
  assert lipschitz.residual(1.0) == norm(2 * np.eye(5))
  np.testing.assert_allclose(rules[-1][0], norm(rules[-1][1]), rtol=1e-6)


def test_a_network_bound_survives_random_pairs_and_is_refuted_when_halved():
  weights = [_random(seed, 8, 8) for seed in range(2)]
  bound = lipschitz.compose(
    *(lipschitz.dense_norm(W, method="svd") for W in weights),
    lipschitz.activation("leaky_relu"),
  )

  def network(x):
    return nnx.leaky_relu(x @ weights[0], 1.0) @ weights[1]

  points = _random(2, 60, 8)
  ratios = [
    np.linalg.norm(network(x) - network(y)) / np.linalg.norm(x - y)
    for x, y in itertools.combinations(points, 2)
  ]
  assert max(ratios) <= bound
  assert max(ratios) > bound / 2


def test_bad_arguments_are_named():
  K = jnp.zeros((3, 3, 1, 3))
  with pytest.raises(ValueError, match="groups must divide"):
    lipschitz.conv_norm(K, groups=2)
  with pytest.raises(ValueError, match="input_shape"):
    lipschitz.conv_norm(K, (3,))
  with pytest.raises(ValueError, match="stride"):
    lipschitz.average_pool((2, 2), (2,))
  with pytest.raises(ValueError, match="num_items"):
    lipschitz.mean_pool(0)


def chain_layers(seed, sizes, num_classes=4):
  keys = iter(jax.random.split(jax.random.key(seed), len(sizes)))
  kernels = [
    jax.random.normal(next(keys), (out, size)) / size**0.5
    for size, out in itertools.pairwise(sizes)
  ]
  return kernels, jax.random.normal(next(keys), (num_classes, sizes[-1]))


@pytest.mark.parametrize("sizes", [(5,), (6, 9), (7, 12, 5), (4, 8, 8, 8)])
@pytest.mark.parametrize("activation", [jax.nn.relu, jnp.tanh, nnx.leaky_relu])
def test_dense_chain_bounds_every_gradient_and_no_more_than_products(
  sizes, activation
):
  kernels, rows = chain_layers(1, sizes)
  table = lipschitz.dense_chain(kernels, rows)

  def logits(x, shifts):
    for kernel, shift in zip(kernels, shifts):
      x = activation(kernel @ x + shift)
    return rows @ x

  def norms(key):
    first, second = jax.random.split(key)
    shifts = [jax.random.normal(second, (n,)) for n in sizes[1:]]
    x = 3 * jax.random.normal(first, (sizes[0],))
    slope = jax.jacrev(logits)(x, shifts)
    return jnp.linalg.norm(slope[:, None] - slope[None], axis=-1)

  found = jnp.max(jax.vmap(norms)(jax.random.split(jax.random.key(2), 300)), 0)
  assert np.all(np.asarray(found) <= np.asarray(table) * (1 + 1e-6))
  product = np.prod([np.linalg.norm(k, 2) for k in kernels])
  distance = np.linalg.norm(rows[:, None] - rows[None], axis=-1)
  assert np.all(np.asarray(table) <= product * distance * (1 + 1e-4) + 1e-6)


def test_dense_chain_is_exact_for_single_units_and_refutable_there():
  kernels = [jnp.array([[2.0]]), jnp.array([[-3.0]])]
  rows = jnp.array([[1.0], [0.5]])
  table = lipschitz.dense_chain(kernels, rows)
  np.testing.assert_allclose(table[0, 1], 2 * 3 * 0.5, rtol=1e-5)
  assert table[0, 0] == 0
  # relu(-3 relu(2 x) + 9) has slope -6 between 0 and 1.5.
  x = np.array([0.2, 1.2])
  z = np.maximum(-3 * np.maximum(2 * x, 0) + 9, 0) * 0.5
  slope = abs(z[1] - z[0]) / 1.0
  assert slope <= table[0, 1]
  assert slope > table[0, 1] / 1.2


@pytest.mark.parametrize(
  "net",
  [
    *("digits_plain", "digits_penalty0p03", "digits_penalty0p1"),
    *("mfeat_plain", "mfeat_penalty0p01", "mfeat_penalty0p03"),
  ],
)
def test_dense_chain_equals_an_established_library(shared_path, net):
  path = shared_path / f"reference/certificates/{net}.npz"
  with np.load(path) as file:
    stored = dict(file)
  for name in map(str, stored["modalities"]):
    layers = [stored[f"params/{name}/dense_{i}/kernel"] for i in (0, 1)]
    layers.append(stored[f"params/head/{name}/kernel"])
    reference = stored[f"sensitivity/eclipse_fast/{name}"]
    *kernels, rows = [jnp.asarray(layer.T) for layer in layers]
    single = np.asarray(lipschitz.dense_chain(kernels, rows))
    with jax.enable_x64(True):
      *kernels, rows = [jnp.asarray(layer.T, jnp.float64) for layer in layers]
      double = np.asarray(lipschitz.dense_chain(kernels, rows))
    np.testing.assert_allclose(double, reference, rtol=1e-8)
    np.testing.assert_allclose(single, reference, rtol=1e-4)
    assert np.all(single >= reference)


def test_dense_chain_has_gradients_and_refuses_layers_that_do_not_fit():
  kernels, rows = chain_layers(3, (5, 6, 7))

  def largest(kernels):
    return jnp.sum(lipschitz.dense_chain(kernels, rows, num_iters=6))

  gradient = jax.jit(jax.grad(largest))(kernels)
  step = 1e-2
  for index, kernel in enumerate(kernels):
    direction = gradient[index] / jnp.linalg.norm(gradient[index])
    ends = []
    for sign in (-1, 1):
      moved = list(kernels)
      moved[index] = kernel + sign * step * direction
      ends.append(largest(moved))
    slope = (ends[1] - ends[0]) / (2 * step)
    np.testing.assert_allclose(
      slope, jnp.linalg.norm(gradient[index]), rtol=2e-2
    )
  with pytest.raises(ValueError, match=r"kernels\[0\]"):
    lipschitz.dense_chain(kernels[:1], rows)
