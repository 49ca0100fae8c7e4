"""A vision tower: pictures -> the features that the projector takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PretrainedConfig

from tinychat.config import VisionConfig
from tinychat.layers.cpu_tower import CpuTower
from tinychat.layers.one_call import Obstacle, split
from tinychat.layers.parallel import Source, group_of
from tinychat.models.clip import CLIPVisionTransformer, check_pixels
from tinychat.models.siglip import SiglipVisionTransformer

_TOWERS = {"clip": CLIPVisionTransformer, "siglip": SiglipVisionTransformer}


class VisionTower(nn.Module):
    """pixels `[N, 3, H, W]` -> `[N, features, Dv]`: hidden_states[select_layer], without CLS for feature "patch".

    Of several layers the features are joined: Dv is their widths' sum.
    """

    def __init__(self, config: VisionConfig | PretrainedConfig, weights: Source = None) -> None:
        super().__init__()
        self.config = VisionConfig.of(config)
        self.group = group_of(weights)
        self.vision_model = _TOWERS[self.config.family]("vision_model", self.config, weights)
        self._one_call: CpuTower | None = None
        self.obstacle: str | None = None  # to running it as a whole, when that was last tried

    def forward(self, pixels: Tensor) -> Tensor:
        keeps_gradients = pixels.requires_grad and torch.is_grad_enabled()
        one_call = None if keeps_gradients else self.one_call
        found = [self._hidden(pixels, layer, one_call) for layer in self.config.select_layers]
        hidden = found[0] if len(found) == 1 else torch.cat(found, dim=-1)
        drop_class = self.config.has_class_token and self.config.select_feature == "patch"
        return hidden[:, 1:] if drop_class else hidden

    def _hidden(self, pixels: Tensor, layer: int, one_call: CpuTower | None) -> Tensor:
        """hidden_states[layer] `[N, tokens, D]`."""
        if one_call is None:
            return self.vision_model.hidden_state(pixels, layer)
        check_pixels(pixels, self.config)
        depth = self.vision_model.encoder.depth(layer)
        return one_call.forward(pixels, depth).to(self.vision_model.embeddings.patch_embedding.weight.dtype)

    @property
    def one_call(self) -> CpuTower | None:
        """The tower as one call of the CPU kernels a picture; None where its modules run. Modules may be changed."""
        if self._one_call is None or not self._one_call.is_current():
            self._one_call, self.obstacle = None, split(self.group)
            if self.obstacle is not None:
                return None
            try:
                self._one_call = CpuTower.of(self.vision_model, self.config)
            except Obstacle as error:
                self.obstacle = str(error)
        return self._one_call

    def _apply(self, fn: Any, recurse: bool = True) -> VisionTower:
        self._one_call = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_one_call": None}
