"""A vision tower: pictures -> the features that the projector takes."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.configuration_utils import PretrainedConfig

from tinychat.config import VisionConfig
from tinychat.layers.parallel import WeightSource
from tinychat.models.clip import CLIPVisionTransformer
from tinychat.models.siglip import SiglipVisionTransformer

_TOWERS = {"clip": CLIPVisionTransformer, "siglip": SiglipVisionTransformer}


class VisionTower(nn.Module):
    """pixels `[N, 3, H, W]` -> `[N, features, Dv]`: hidden_states[select_layer], without CLS for feature "patch"."""

    def __init__(self, config: VisionConfig | PretrainedConfig, weights: WeightSource | None = None) -> None:
        super().__init__()
        self.config = VisionConfig.of(config)
        self.vision_model = _TOWERS[self.config.family]("vision_model", self.config, weights)

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = self.vision_model.hidden_state(pixels, self.config.select_layer)
        drop_class = self.config.has_class_token and self.config.select_feature == "patch"
        return hidden[:, 1:] if drop_class else hidden
