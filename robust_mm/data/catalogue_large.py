"""Data sets whose shapes and classes are those of the user's own extraction.

Imports nothing but the standard library. None in a shape is any size; sizes,
dtypes, classes and splits are read from the records (``prepared.describe``).
"""

from robust_mm.data.catalogue_entries import DatasetInfo
from robust_mm.data.catalogue_entries import ModalityInfo

_NOTES = (
  "Arrays as you extracted them: nothing is decoded, resampled or resized.",
  "Columns are mapped from the disk, not read into memory.",
)
_RAW_FILES = ("classes.csv", "train.csv", "validation.csv", "test.csv")
_AUDIO = ModalityInfo(
  shape=(None, None), kind="spectrogram", unit="log-mel power, frames x bands"
)
_VIDEO = ModalityInfo(
  shape=(None, None, None, None), kind="video", unit="frames, as extracted"
)


def _entry(**given) -> DatasetInfo:
  return DatasetInfo(
    num_classes=None,
    splits={},
    default_modalities=tuple(sorted(given["modalities"])),
    kind="prepared",
    notes=_NOTES,
    raw_files=_RAW_FILES,
    measured=True,
    **given,
  )


LARGE = (
  _entry(
    name="audioset",
    description=(
      "AudioSet: log-mel frames and video frames of ten seconds, any number "
      "of 527 sounds, or of the classes of your classes.csv."
    ),
    modalities={"audio": _AUDIO, "video": _VIDEO},
    multi_label=True,
    origin="your own extraction of AudioSet segments",
    licence="labels CC BY 4.0; the videos belong to their makers",
    citation="Gemmeke et al., ICASSP 2017",
  ),
  _entry(
    name="imagenet_captions",
    description=(
      "ImageNet-Captions: image and token ids of its original caption, one of "
      "the classes of your classes.csv."
    ),
    modalities={
      "caption": ModalityInfo(
        shape=(None,),
        kind="tokens",
        dtype="int32",
        stored="int32",
        unit="token ids of your tokeniser, 0 pad",
      ),
      "image": ModalityInfo(
        shape=(None, None, None), kind="image", unit="pixels, as extracted"
      ),
    },
    origin="your own extraction of ImageNet-Captions",
    licence="ImageNet terms; captions belong to their writers",
    citation="Fang et al., ICML 2022",
  ),
  _entry(
    name="kinetics",
    description=(
      "Kinetics, or Kinetics-Sounds: video frames and log-mel frames of its "
      "sound, one of the actions of your classes.csv."
    ),
    modalities={"audio": _AUDIO, "video": _VIDEO},
    origin="your own extraction of Kinetics clips",
    licence="annotations CC BY 4.0; the videos belong to their makers",
    citation="Kay et al. 2017; Arandjelovic and Zisserman, ICCV 2017",
  ),
)
