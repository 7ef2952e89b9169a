"""Models: encoders and fusion heads behind one contract of pure functions.

flax lives here and nowhere else.
"""

from robust_mm._types import Target
from robust_mm._types import TokenParts
from robust_mm.models import captioning
from robust_mm.models import decoding
from robust_mm.models import encoders
from robust_mm.models import functional
from robust_mm.models import fusion
from robust_mm.models import labels
from robust_mm.models import lipschitz
from robust_mm.models import lipschitz_layers
from robust_mm.models import masked
from robust_mm.models import normalization
from robust_mm.models import patches
from robust_mm.models import regression
from robust_mm.models import transformer
from robust_mm.models import trunk
from robust_mm.models import vit
from robust_mm.models.encoders import custom
from robust_mm.models.functional import Encoder
from robust_mm.models.fusion import ConcatFusion
from robust_mm.models.fusion import OrthogonalFusion
from robust_mm.models.fusion import TokenFusion
from robust_mm.models.fusion import head_defect
from robust_mm.models.labels import multi_label
from robust_mm.models.masked import MaskedFusion
from robust_mm.models.multimodal import build
from robust_mm.models.multimodal import captioner
from robust_mm.models.multimodal import concat_fusion
from robust_mm.models.multimodal import from_parts
from robust_mm.models.multimodal import late_fusion
from robust_mm.models.multimodal import masked_fusion
from robust_mm.models.multimodal import token_fusion
from robust_mm.models.multimodal import trunk_fusion
from robust_mm.models.normalization import Normalization
from robust_mm.models.normalization import fit_normalization
from robust_mm.models.plain import from_function
from robust_mm.models.token_models import token_transformer
from robust_mm.models.transformer import TransformerFusion
from robust_mm.models.trunk import TrunkFusion
from robust_mm.models.vit import VisionTransformer
from robust_mm.models.vit import vision_transformer

__all__ = [
  "ConcatFusion",
  "Encoder",
  "MaskedFusion",
  "Normalization",
  "OrthogonalFusion",
  "Target",
  "TokenFusion",
  "TokenParts",
  "TransformerFusion",
  "TrunkFusion",
  "VisionTransformer",
  "build",
  "captioner",
  "captioning",
  "concat_fusion",
  "custom",
  "decoding",
  "encoders",
  "fit_normalization",
  "from_function",
  "from_parts",
  "functional",
  "fusion",
  "head_defect",
  "labels",
  "late_fusion",
  "lipschitz",
  "lipschitz_layers",
  "masked",
  "masked_fusion",
  "multi_label",
  "normalization",
  "patches",
  "regression",
  "token_fusion",
  "token_transformer",
  "transformer",
  "trunk",
  "trunk_fusion",
  "vision_transformer",
  "vit",
]
