"""CMU-MOSI utterance features in the bc-LSTM release.

Raw file ``mosi.npz``: ``text_feat`` [n, 100], ``audio_feat`` [n, 73],
``video_feat`` [n, 100], ``tokens`` [n, 114] (0 pad, 1 unknown), ``vocab``
[1003], ``label``, ``split``, ``test_fold``, ``video_index``, ``segment`` [n].
"""

import pathlib

import numpy as np

from robust_mm.data.builders import base
from robust_mm.data.builders import raw

_NUM_WORDS = 1003
_SHAPES = {
  "text_feat": (None, 100),
  "audio_feat": (None, 73),
  "video_feat": (None, 100),
  "tokens": (None, 114),
  "vocab": (_NUM_WORDS,),
  "label": (None,),
  "split": (None,),
  "test_fold": (None,),
  "video_index": (None,),
  "segment": (None,),
}


class Mosi(base.ColumnsBuilder):
  """Raw feature scales; words are derived from the tokens."""

  def columns(self, folder: pathlib.Path) -> dict[str, dict[str, np.ndarray]]:
    """Features, tokens and words, by split."""
    file = folder / "mosi.npz"
    arrays = raw.read(file, _SHAPES)
    raw.check_codes(file, "label", arrays["label"], 2)
    raw.check_codes(file, "split", arrays["split"], 3)
    raw.check_codes(file, "tokens", arrays["tokens"], _NUM_WORDS)
    columns = {
      f"inputs/{name}": arrays[f"{name}_feat"].astype(np.float32, copy=False)
      for name in ("audio", "text", "video")
    }
    columns["inputs/tokens"] = arrays["tokens"].astype(np.int32)
    columns["inputs/words"] = words(columns["inputs/tokens"], _NUM_WORDS)
    columns["label"] = arrays["label"].astype(np.int32)
    columns["id"] = np.arange(len(arrays["label"]), dtype=np.int32)
    for name in ("segment", "test_fold", "video_index"):
      columns[f"metadata/{name}"] = arrays[name].astype(np.int32)
    return raw.by_split(arrays["split"], columns)


def words(tokens: np.ndarray, size: int) -> np.ndarray:
  r"""``[n, t]`` word ids -> ``[n, size]``, l2-normalised bag of words.

  .. math:: x_w = [w \text{ occurs}] / \sqrt{\text{number of different words}}

  Presence, not counts: it is the better of the two for sentiment. Padding is
  no word, the unknown word is one; an utterance without words is zero.

  References:
    Pang, Lee, Vaithyanathan (2002), Thumbs up? Sentiment classification using
    machine learning techniques, section 6.
  """
  bag = np.zeros((len(tokens), size), np.float32)
  np.put_along_axis(bag, tokens.astype(np.int64), 1.0, axis=1)
  bag[:, 0] = 0.0
  norm = np.sqrt(bag.sum(axis=1, keepdims=True))
  return bag / np.maximum(norm, 1.0)
