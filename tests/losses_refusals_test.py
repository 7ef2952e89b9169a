"""What penalties and their loss refuse, and how a penalty is shown."""

import jax
import jax.numpy as jnp
import losses_penalties as helpers
import numpy as np
import pytest

from robust_mm import losses

N, C = helpers.N, helpers.C


@pytest.fixture(autouse=True)
def _float64():
  with jax.enable_x64(True):
    yield


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: losses.topk_level(window=(2, 2)), "window must be two integers"),
    (lambda: losses.topk_level(window=(-1, 2)), "window must be two integers"),
    (
      lambda: losses.topk_level(window=(0, 1, 2)),
      "window must be two integers",
    ),
    (lambda: losses.topk_dispersion(window=(0, 1)), "at least 2 ranks"),
    (lambda: losses.topk_level(space="prob"), "space must be one of"),
    (lambda: losses.topk_level(level_scope="local"), "level_scope must be"),
    (
      lambda: losses.wrong_class_dispersion(space="log_prob"),
      "space must be 'logit' or 'prob'",
    ),
    (
      lambda: losses.wrong_class_dispersion(space="prob", center="published"),
      "center must be 'mean'",
    ),
    (lambda: losses.topk_margin(form="none"), "form must be one of"),
    (lambda: losses.topk_margin(gamma=np.inf), "gamma must be finite"),
    (lambda: losses.sorted_slice_dispersion(top_n=2), "top_n"),
    (lambda: losses.penalty("drsl"), "name must be one of"),
    (lambda: losses.penalty("topk_level", top=3), "options of the penalty"),
    (
      lambda: losses.restrained_softmax(losses.topk_level(), -1.0),
      "weight must be non-negative",
    ),
    (
      lambda: losses.restrained_softmax(
        losses.topk_level(), 1.0, fidelity="exact"
      ),
      "fidelity must be one of",
    ),
    (
      lambda: losses.restrained_softmax(
        losses.complement_kl(), 1.0, fidelity="published"
      ),
      "was never published",
    ),
    (
      lambda: losses.restrained_softmax(
        losses.sorted_slice_dispersion(top_n=3), 1.0
      ),
      "needs fidelity='published'",
    ),
    (
      lambda: losses.restrained_softmax(
        losses.wrong_class_dispersion(space="prob"), 1.0, fidelity="published"
      ),
      "space='prob'.*which was never published",
    ),
    (
      lambda: losses.mean_weight(
        losses.wrong_class_dispersion(space="prob"), 1.0, 8, 3
      ),
      "penalty must be one that was published",
    ),
    (
      lambda: losses.mean_weight(losses.complement_kl(), 1.0, 1, 3),
      "penalty must be one of",
    ),
  ],
)
def test_bad_arguments_are_refused_by_name(make, message):
  with pytest.raises(ValueError, match=message):
    make()


@pytest.mark.parametrize(
  "penalty, change, message",
  [
    (losses.topk_level(window=(0, C)), {}, "window must end at 6 at most"),
    (losses.wrong_class_dispersion(), {"classes": 2}, "at least three classes"),
    (losses.complement_kl(), {"classes": 2}, "at least three classes"),
    (losses.topk_level(level_scope=4), {}, "level_scope must divide the 6"),
    (losses.topk_level(), {"label": np.full(N, C)}, "labels must lie in 0..6"),
    (losses.topk_level(), {"label": np.zeros(N)}, "labels must be integer"),
    (losses.topk_level(), {"valid": np.ones(N)}, "valid must be bool"),
    (losses.topk_level(), {"valid": np.ones(3, bool)}, "valid must be bool"),
    (
      losses.topk_level(),
      {"valid_weights": -np.ones(N)},
      "valid_weights must be non-negative",
    ),
    *(
      (
        losses.topk_level(),
        {"valid_weights": np.where(np.arange(N), 1.0, bad)},
        "valid_weights must be non-negative and finite",
      )
      for bad in (np.nan, np.inf)
    ),
    (
      losses.topk_level(),
      {"valid_weights": np.ones(3)},
      "valid_weights must have shape",
    ),
  ],
)
def test_bad_batches_are_refused_by_name(penalty, change, message):
  change = dict(change)
  logits, label = helpers.sample(classes=change.pop("classes", C))
  label = change.pop("label", label)
  loss_fn = losses.restrained_softmax(penalty, 1.0)
  with pytest.raises(ValueError, match=message):
    loss_fn(jnp.asarray(logits), label, **change)


@pytest.mark.parametrize("bad", ["1", None, [1.0], np.ones(2)], ids=str)
def test_a_weight_is_one_number(bad):
  make = losses.restrained_softmax.__wrapped__  # without the tests' type checks
  with pytest.raises(ValueError, match="weight must be one number"):
    make(losses.topk_level(), bad)


def test_gamma_is_a_number():
  with pytest.raises(ValueError, match="gamma must be finite, and a number"):
    losses.topk_margin.__wrapped__(gamma="x")


@pytest.mark.parametrize(
  "logits", [[[0.0, 1.0, 2.0]], np.zeros(3), np.zeros((1, 1, 1, 3)), None]
)
def test_logits_are_an_array_of_items(logits):
  loss_fn = losses.restrained_softmax(losses.complement_kl(), 1.0)
  with pytest.raises(ValueError, match="logits must be an array"):
    loss_fn(logits, np.array([0]))


def test_scores_need_to_know_where_every_modality_is():
  scores = dict.fromkeys("ab", jnp.zeros((2, C)))
  with pytest.raises(ValueError, match="'b' is missing"):
    losses.score_penalty(
      losses.complement_kl(), scores, np.array([0, 1]), {"a": np.ones(2, bool)}
    )


@pytest.mark.parametrize(
  "given, message",
  [
    ((-1.0, 8, C), "published_weight must be non-negative"),
    ((1.0, -5, C), "num_items must be an integer of at least 1"),
    ((1.0, 8, 0), "window must end at"),
  ],
)
def test_a_published_weight_is_converted_for_what_there_is(given, message):
  with pytest.raises(ValueError, match=message):
    losses.mean_weight(losses.topk_level(), *given)


@pytest.mark.parametrize(
  "given",
  [
    *({"name": name} for name in ("wrong_class_dispersion", "complement_kl")),
    {"name": "wrong_class_dispersion", "space": "prob"},
    {"name": "sorted_slice_dispersion", "top_n": 5, "kind": "drsl2"},
    {"name": "topk_level", "window": (0, 2), "level_scope": 4},
    {"name": "topk_dispersion", "window": (1, 3)},
    {"name": "topk_margin", "form": "relu", "gamma": 0.5},
    *({"name": name} for name in ("label_smoothing", "logit_norm")),
    {"name": "confidence_penalty"},
  ],
  ids=str,
)
def test_a_penalty_is_shown_as_the_call_that_makes_it(given):
  made = losses.penalty(**given)
  again = eval(repr(made), vars(losses))
  assert (again.name, again.options) == (made.name, made.options)
  for option, value in given.items():
    assert option == "name" or again.options[option] == value
  assert repr(again) == repr(made)


def test_a_window_beyond_two_classes_leaves_one_rank():
  """C = 2: one wrong class; a level and a margin exist, a dispersion not."""
  logits, label = helpers.sample(classes=2)
  for make in (losses.topk_level, losses.topk_margin):
    loss, aux = losses.restrained_softmax(make(window=(0, 1)), 1.0)(
      jnp.asarray(logits), label
    )
    assert np.isfinite(loss)
    assert aux["wrong_dispersion"] == 0
