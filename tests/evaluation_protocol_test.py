"""evaluation.standard: a frozen value that refuses nonsense by name."""

import dataclasses
import json
import math

import pytest

from robust_mm import evaluation


def test_radii_are_sorted_and_distinct():
  protocol = evaluation.standard(radii=(0.5, 0.1, 0.5))
  assert protocol.radii == (0.1, 0.5)
  assert protocol.modality_grid("audio") == (0.1, 0.5)


def test_modality_radii_by_name_leave_the_others_alone():
  protocol = evaluation.standard(modality_radii={"audio": (0.2,)})
  assert protocol.modality_grid("audio") == (0.2,)
  assert protocol.modality_grid("image") == ()


def test_protocol_is_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    evaluation.standard().norm = 3


@pytest.mark.parametrize("norm", [2, math.inf, "inf"])
def test_settings_survive_json(norm):
  protocol = evaluation.standard(norm=norm, valid_range={"a": (0.0, 1.0)})
  settings = json.loads(json.dumps(protocol.settings, allow_nan=False))
  assert settings == protocol.settings
  assert settings["norm"] == (2 if norm == 2 else "inf")
  assert settings["attacks"][0]["num_steps"] == 50


@pytest.mark.parametrize(
  "arguments, word",
  [
    ({"radii": (0.0,)}, "radii"),
    ({"radii": (-1.0,)}, "radii"),
    ({"modality_radii": {"a": (math.inf,)}}, "modality_radii"),
    ({"norm": 3}, "norm"),
    ({"certificate": "exact"}, "certificate"),
    ({"units": "relativ"}, "units"),
    ({"units": {"a": 0.0}}, "units"),
    ({"attack": {"num_steps": 5}}, "attack"),
    ({"attack": {"name": "pgd", "budget": 1.0}}, "budget"),
    ({"subsets": [()]}, "subsets"),
    ({"batch_size": 0}, "batch_size"),
    ({"max_examples": 0}, "max_examples"),
    ({"tightness": (0.0,)}, "tightness"),
  ],
)
def test_bad_argument_is_named(arguments, word):
  with pytest.raises(ValueError, match=word):
    evaluation.standard(**arguments)


def test_every_subset_up_to_six_modalities_and_the_ends_above():
  protocol = evaluation.standard()
  assert len(protocol.subset_names("abc")) == 7
  many = protocol.subset_names("abcdefgh")
  assert len(many) == 8 + 8 + 1
  assert {len(subset) for subset in many} == {1, 7, 8}
  assert evaluation.standard(subsets=False).subset_names("abc") == ()
  chosen = evaluation.standard(subsets=[("b", "a")])
  assert chosen.subset_names("abc") == (("a", "b"),)
