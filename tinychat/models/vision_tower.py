"""A vision tower: pictures -> the features that the projector takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PretrainedConfig

from tinychat.config import VisionConfig
from tinychat.layers.cpu_tower import CpuTower
from tinychat.layers.parallel import WeightSource
from tinychat.models.clip import CLIPVisionTransformer, check_pixels
from tinychat.models.siglip import SiglipVisionTransformer
from tinychat_kernels.errors import KernelError

_TOWERS = {"clip": CLIPVisionTransformer, "siglip": SiglipVisionTransformer}


class VisionTower(nn.Module):
    """pixels `[N, 3, H, W]` -> `[N, features, Dv]`: hidden_states[select_layer], without CLS for feature "patch"."""

    def __init__(self, config: VisionConfig | PretrainedConfig, weights: WeightSource | None = None) -> None:
        super().__init__()
        self.config = VisionConfig.of(config)
        self.vision_model = _TOWERS[self.config.family]("vision_model", self.config, weights)
        self._one_call: CpuTower | None = None
        self.obstacle: str | None = None  # to running it as a whole, when that was last tried

    def forward(self, pixels: Tensor) -> Tensor:
        keeps_gradients = pixels.requires_grad and torch.is_grad_enabled()
        one_call = None if keeps_gradients else self.one_call
        if one_call is None:
            hidden = self.vision_model.hidden_state(pixels, self.config.select_layer)
        else:
            check_pixels(pixels, self.config)
            depth = self.vision_model.encoder.depth(self.config.select_layer)
            hidden = one_call.forward(pixels, depth).to(self.vision_model.embeddings.patch_embedding.weight.dtype)
        drop_class = self.config.has_class_token and self.config.select_feature == "patch"
        return hidden[:, 1:] if drop_class else hidden

    @property
    def one_call(self) -> CpuTower | None:
        """The tower as one call of the CPU kernels a picture; None where its modules run. Modules may be changed."""
        if self._one_call is None or not self._one_call.is_current():
            self._one_call, self.obstacle = None, None
            try:
                self._one_call = CpuTower.of(self.vision_model, self.config)
            except KernelError as error:
                self.obstacle = str(error)
        return self._one_call

    def _apply(self, fn: Any, recurse: bool = True) -> VisionTower:
        self._one_call = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_one_call": None}
