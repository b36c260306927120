"""Models: the table of ours, torchvision's and timm's by name; their heads, adapters and seeded masks."""

from dist_cts.models.fit import check_model as check_model
from dist_cts.models.lora import with_adapters as with_adapters
from dist_cts.models.masks import SeededMasks as SeededMasks
from dist_cts.models.small_resnet import SmallResNet as SmallResNet
from dist_cts.models.table import MODELS as MODELS
from dist_cts.models.table import Architecture as Architecture
from dist_cts.models.table import ModelConfig as ModelConfig
from dist_cts.models.table import build as build
from dist_cts.models.table import pretrained as pretrained
