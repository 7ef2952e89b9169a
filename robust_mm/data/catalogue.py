"""The named data sets: shapes, ranges, splits, licences, warnings.

Imports nothing but the standard library.
"""

import dataclasses

from robust_mm.data.catalogue_entries import DatasetInfo
from robust_mm.data.catalogue_entries import ModalityInfo

_DIGITS = tuple("0123456789")
_UNIT = (0.0, 1.0)

_AV_DIGITS = DatasetInfo(
  name="av_digits",
  description=(
    "MNIST image and spoken digit (FSDD) of the same class, split by the "
    "official rules of both sources."
  ),
  modalities={
    "audio": ModalityInfo(
      shape=(64, 40),
      kind="spectrogram",
      value_range=_UNIT,
      stored="uint8",
      divisor=255.0,
      unit="log-mel power, frames x bands, scaled to [0, 1]",
    ),
    "image": ModalityInfo(
      shape=(28, 28, 1),
      kind="image",
      value_range=_UNIT,
      stored="uint8",
      divisor=255.0,
      unit="grey value",
    ),
  },
  num_classes=10,
  class_names=_DIGITS,
  splits={"train": 55000, "validation": 5000, "test": 10000},
  default_modalities=("audio", "image"),
  kind="prepared",
  origin="MNIST; Free Spoken Digit Dataset (8 kHz, 6 speakers)",
  licence="MNIST CC BY-SA 3.0; FSDD CC BY-SA 4.0",
  citation="LeCun et al. 1998; Jackson et al., Free Spoken Digit Dataset",
  notes=(
    "Pairs are artificial: image and audio agree in the label only.",
    "Both modalities are nearly saturated; see av_digits/hard and "
    "av_digits/speaker_disjoint.",
  ),
  raw_files=(
    "mnist_images.npz",
    "fsdd_logmel.npz",
    "fsdd_wave.npz",
    "pairs.npz",
  ),
  config="official",
  metadata=("image_index", "recording", "speaker"),
)

_MFEAT_WIDTHS = {
  "fac": (216, "uint16"),
  "fou": (76, "float32"),
  "kar": (64, "float32"),
  "mor": (6, "float32"),
  "pix": (240, "uint8"),
  "zer": (47, "float32"),
}

_ACTIONS = (
  "swipe left",
  "swipe right",
  "wave",
  "clap",
  "throw",
  "cross arms",
  "basketball shoot",
  "draw x",
  "draw circle clockwise",
  "draw circle counter-clockwise",
  "draw triangle",
  "bowling",
  "boxing",
  "baseball swing",
  "tennis swing",
  "arm curl",
  "tennis serve",
  "push",
  "knock",
  "catch",
  "pick up and throw",
  "jog",
  "walk",
  "sit to stand",
  "stand to sit",
  "lunge",
  "squat",
)

DATASETS = (
  DatasetInfo(
    name="digits",
    description=(
      "scikit-learn's bundled optical digits, left and right half of each "
      "8x8 scan as two modalities."
    ),
    modalities={
      half: ModalityInfo(
        shape=(8, 4, 1), kind="image", value_range=_UNIT, unit="grey value"
      )
      for half in ("left", "right")
    },
    num_classes=10,
    class_names=_DIGITS,
    splits={"train": 1293, "validation": 144, "test": 360},
    default_modalities=("left", "right"),
    kind="embedded",
    origin="sklearn.datasets.load_digits (UCI optical recognition of digits)",
    licence="UCI repository, CC BY 4.0",
    citation="Alpaydin and Kaynak 1998, DOI 10.24432/C50P49",
  ),
  DatasetInfo(
    name="diabetes",
    description=(
      "442 patients, examination and blood serum as two modalities; the label "
      "is a number, the progression of diabetes a year later."
    ),
    modalities={
      "serum": ModalityInfo(
        shape=(6,),
        kind="vector",
        unit="cholesterol (total, LDL, HDL, total/HDL), log triglycerides, "
        "glucose",
      ),
      "vitals": ModalityInfo(
        shape=(4,),
        kind="vector",
        unit="age in years, sex (1 or 2), body mass index, blood pressure",
      ),
    },
    num_classes=0,
    splits={"train": 310, "validation": 44, "test": 88},
    default_modalities=("serum", "vitals"),
    kind="embedded",
    origin="sklearn.datasets.load_diabetes(scaled=False)",
    licence="published with the article, no formal text",
    citation="Efron et al., Least Angle Regression, 2004",
    notes=(
      "Small and noisy: on the test split always saying the training median is "
      "59 off on average, linear regression 45.",
    ),
  ),
  DatasetInfo(
    name="arrays",
    description=(
      "Your own data: train.npz, validation.npz and test.npz in one folder, "
      "each with inputs/<modality>, label and optionally present/<modality>."
    ),
    modalities={},
    num_classes=None,
    splits={},
    default_modalities=(),
    kind="folder",
    origin="the folder given as path",
    licence="yours",
    notes=(
      "Without validation.npz a stratified tenth of train.npz is held out.",
      "Floats are signals, uint8 and uint16 pixels scaled to [0, 1], signed "
      "integers tokens; integer labels are classes, float labels numbers, "
      "labels [n, k] of 0 and 1 several classes at once.",
    ),
  ),
  _AV_DIGITS,
  dataclasses.replace(
    _AV_DIGITS,
    name="av_digits/speaker_disjoint",
    config="speaker_disjoint",
    description=(
      "av_digits whose test recordings come from two speakers never heard in "
      "training."
    ),
    notes=(
      "Pairs are artificial: image and audio agree in the label only.",
      "Test: speakers lucas and yweweler; train and validation: the other "
      "four.",
    ),
  ),
  dataclasses.replace(
    _AV_DIGITS,
    name="av_digits/hard",
    config="hard",
    description=(
      "av_digits with images reduced to the leading principal components that "
      "hold 25 % of their variance and white noise at -5 dB in the audio."
    ),
    notes=(
      "Pairs are artificial: image and audio agree in the label only.",
      "Images are reconstructions from 4 components, scaled so that [0, 1] "
      "spans the training images.",
      "Noise is fixed per recording; a recording recurs in many pairs.",
    ),
  ),
  DatasetInfo(
    name="mfeat",
    description="Six feature views of 2,000 handwritten digits.",
    modalities={
      view: ModalityInfo(
        shape=(width,), kind="vector", stored=stored, unit="raw feature scale"
      )
      for view, (width, stored) in _MFEAT_WIDTHS.items()
    },
    num_classes=10,
    class_names=_DIGITS,
    splits={"train": 1400, "validation": 200, "test": 400},
    default_modalities=("fou", "mor", "zer"),
    kind="prepared",
    origin="UCI Multiple Features, DOI 10.24432/C5HC70, split of TMC",
    licence="UCI repository, CC BY 4.0",
    citation="van Breukelen et al. 1998; split: Han et al., ICLR 2021",
    notes=(
      "Raw scales differ by 10^5 between features: standardise.",
      "pix, fac and kar are saturated alone (.97 to .99).",
      "One of six duplicated rows crosses the split (test row 1903 = training "
      "row 1213).",
    ),
    raw_files=("mfeat.npz",),
  ),
  DatasetInfo(
    name="mosi",
    description=(
      "CMU-MOSI utterance features: words, audio, text and video activations, "
      "binary sentiment."
    ),
    modalities={
      "audio": ModalityInfo(
        shape=(73,), kind="vector", unit="openSMILE statistics, raw scale"
      ),
      "text": ModalityInfo(
        shape=(100,), kind="vector", unit="text-CNN activations (supervised)"
      ),
      "tokens": ModalityInfo(
        shape=(114,),
        kind="tokens",
        dtype="int32",
        stored="int32",
        value_range=(0, 1002),
        unit="word ids, 0 pad, 1 unknown",
      ),
      "video": ModalityInfo(
        shape=(100,), kind="vector", unit="3D-CNN activations (supervised)"
      ),
      "words": ModalityInfo(
        shape=(1003,),
        kind="vector",
        value_range=_UNIT,
        unit="which words occur, l2-normalised; column = word id",
      ),
    },
    num_classes=2,
    class_names=("negative", "positive"),
    splits={"train": 1207, "validation": 240, "test": 752},
    default_modalities=("audio", "words"),
    kind="prepared",
    origin="bc-LSTM release of CMU-MOSI features, speaker-independent split",
    licence="research use; successor repository MIT",
    citation="Zadeh et al. 2016; Poria et al., ACL 2017",
    notes=(
      "WARNING: text and video are activations of networks trained on the "
      "training labels. They look excellent on train and validation (.93 to "
      ".99) and fall to .755 and .516 on test. Never tune or stop on "
      "validation with them; the default, audio and words, is label-free.",
      "Audio scales are raw and heavy-tailed: standardise.",
      "The split is bc-LSTM's, not the standard fold of the MOSI SDK.",
    ),
    raw_files=("mosi.npz",),
    metadata=("segment", "test_fold", "video_index"),
  ),
  DatasetInfo(
    name="utd_mhad",
    description=(
      "UTD-MHAD: wearable inertial sensor, skeleton and depth recorded "
      "together, 27 actions, official cross-subject split."
    ),
    modalities={
      "depth": ModalityInfo(
        shape=(16, 48, 48, 1),
        kind="video",
        value_range=_UNIT,
        stored="uint8",
        divisor=255.0,
        unit="0 background, 1/255 .. 1 = 4.00 m .. 1.75 m",
      ),
      "inertial": ModalityInfo(
        shape=(128, 6),
        kind="sequence",
        unit="0-2 acceleration in g, 3-5 rotation rate in rad/s",
      ),
      "skeleton": ModalityInfo(
        shape=(32, 60),
        kind="sequence",
        unit="20 joints x 3 in metres, minus the hip centre of frame 0",
      ),
    },
    num_classes=27,
    class_names=_ACTIONS,
    splits={"train": 323, "validation": 108, "test": 430},
    default_modalities=("depth", "inertial", "skeleton"),
    kind="prepared",
    origin="University of Texas at Dallas, without RGB",
    licence="no formal text; the authors call it freely available, cite it",
    citation="Chen, Jafari, Kehtarnavaz, ICIP 2015",
    notes=(
      "Rotation rates are converted from deg/s to rad/s, so both halves of "
      "inertial have scales of order one.",
      "Subjects 1, 3, 5 train, 7 validation; 2, 4, 6, 8 test.",
    ),
    raw_files=("utd_mhad.npz",),
    metadata=("subject", "trial"),
  ),
)
