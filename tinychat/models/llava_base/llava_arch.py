"""The two base classes of LLaVA-shaped models: who owns tower and projector, and how pictures enter a prompt.

Signatures follow LLaVA's and llm-awq's `llava_arch`; the fusion itself is in tinychat.models.vila_fusion.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tinychat.checkpoint import Index, Weights, rename
from tinychat.config import ProjectorConfig, VilaConfig, VisionConfig, read_json
from tinychat.errors import ModelError, UsageError
from tinychat.layers.parallel import ALONE, Group, Later
from tinychat.layers.torch_threads import one_thread
from tinychat.models import vila_fusion
from tinychat.models.anyres import pack_tiles
from tinychat.models.projector import Projector
from tinychat.models.vila_fusion import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from tinychat.models.vision_tower import VisionTower
from tinychat.tiling import Tiles, Tiling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE_PATCH_TOKEN, IMAGE_START_TOKEN, IMAGE_END_TOKEN = "<im_patch>", "<im_start>", "<im_end>"
Multimodal = tuple[Tensor | None, Tensor | None, Tensor | None, Any, Tensor | None, Tensor | None]


class LlavaMetaModel:
    """Owns the vision tower and the projector."""

    config: VilaConfig
    vision_tower: VisionTower | None
    mm_projector: Projector | None
    image_newline: nn.Parameter | None
    tiling: Tiling | None

    def __init__(self, config: VilaConfig) -> None:
        super().__init__(config)  # type: ignore[call-arg]  # a mixin: the next class in line takes the config
        self.build_vision(config.vision, config.projector, config.tiling)

    def build_vision(
        self, vision: VisionConfig | None, projector: ProjectorConfig | None, tiling: Tiling | None = None,
        group: Group = ALONE,
    ) -> None:  # fmt: skip
        """Make the tower, the projector and, for tiles, the newline with empty parameters; None leaves them out.

        The ranks of a group share the tower, each of them has the rest.
        """
        self.vision_tower = VisionTower(vision, Later(group)) if vision else None
        self.mm_projector = Projector(projector) if projector else None
        self.tiling = tiling
        width = projector.hidden_size if projector and tiling else None
        self.image_newline = nn.Parameter(torch.randn(width) * width**-0.5) if width else None

    def get_vision_tower(self) -> nn.Module | None:
        """The tower, or None for a text-only model. A list (as FSDP wraps it) is opened."""
        tower: Any = self.vision_tower
        return tower[0] if isinstance(tower, (list, tuple)) else tower

    def initialize_vision_modules(self, model_args: Any, fsdp: Any = None) -> None:
        """Set up tower and projector for training from LLaVA's model_args (any object with these attributes).

        mm_vision_tower (a folder, whose weights are taken, or a config for an empty tower), mm_projector_type,
        mm_vision_select_layer, mm_vision_select_feature, pretrain_mm_mlp_adapter (a projector's weights). With `fsdp`
        (a non-empty sequence) the tower is hidden from FSDP in a list. What exists already is kept, only unfrozen.
        """
        self._note_vision_args(model_args)
        vision, projector = self.config.vision, self.config.projector
        if vision is None or projector is None:
            raise UsageError("model_args name no vision tower", "set mm_vision_tower to a tower's config")
        like = next(self.parameters()) if isinstance(self, nn.Module) else torch.empty(0)
        if self.get_vision_tower() is None:
            self.vision_tower = VisionTower(vision, _tower_weights(model_args)).to(like.device, like.dtype)
        if self.mm_projector is None:
            self.mm_projector = Projector(projector).to(like.device, like.dtype)
        self.mm_projector.requires_grad_(True)
        if fsdp:
            tower = self.get_vision_tower()
            del self.vision_tower
            self.vision_tower = [tower]  # type: ignore[assignment]  # a list: FSDP must not see the frozen tower
        if adapter := getattr(model_args, "pretrain_mm_mlp_adapter", None):
            self.load_projector(Path(adapter))

    def _note_vision_args(self, model_args: Any) -> None:
        config = self.config
        tower = getattr(model_args, "mm_vision_tower", None)
        if tower is not None and config.vision_tower_cfg is None:
            config.vision_tower_cfg = _tower_config(tower)
        for name in ("mm_vision_select_layer", "mm_vision_select_feature", "mm_use_im_start_end"):
            if (value := getattr(model_args, name, None)) is not None:
                setattr(config, name, value)
        if config.mm_projector_cfg is None and config.vision_tower_cfg is not None:
            config.mm_projector_cfg = {"mm_projector_type": getattr(model_args, "mm_projector_type", "linear")}

    def load_projector(self, path: Path) -> None:
        """Fill the projector from an adapter file (weights_only); names are taken from after `mm_projector.`."""
        assert self.mm_projector is not None
        state = _read_adapter(path)
        ours = {
            rename(key[key.index("mm_projector.") :], "llava"): t for key, t in state.items() if "mm_projector." in key
        }
        named = {key.removeprefix("mm_projector."): tensor for key, tensor in ours.items()}
        wanted = self.mm_projector.state_dict()
        if named.keys() != wanted.keys():
            raise ModelError(f"{path} holds {sorted(named)}, the projector has {sorted(wanted)}", "give a fitting one")
        self.mm_projector.load_state_dict(named)


class LlavaMetaForCausalLM(ABC):
    """Mixin of a causal language model that takes pictures."""

    config: VilaConfig

    @abstractmethod
    def get_model(self) -> Any:
        """The module that owns the tower, the projector and the embeddings."""

    def get_vision_tower(self) -> nn.Module | None:
        return self.get_model().get_vision_tower()

    def embed_text(self, ids: Tensor) -> Tensor:
        """ids of any shape -> embeddings `[..., D]`."""
        return self.get_input_embeddings()(ids)  # type: ignore[attr-defined]  # every PreTrainedModel has it

    def encode_images(self, images: Tensor | list[Tensor] | Tiles) -> Tensor | list[Tensor]:
        """(B, C, H, W), 5-D (B, n, C, H, W) or a list of (C, H, W) or (n, C, H, W) -> features `[N, n, D]`.

        N counts the pictures in order. A model that cuts them takes Tiles, and gives `[n, D]` of each picture's own n.
        Raises ModelError for a text-only model, UsageError for whole pictures where tiles are wanted or the reverse.
        """
        return self._encode(images)[0]

    def _encode(self, images: Tensor | list[Tensor] | Tiles) -> tuple[Tensor | list[Tensor], list[int]]:
        """The features of all pictures, and how many pictures each element of `images` held."""
        tower, model = self.get_vision_tower(), self.get_model()
        if tower is None or model.mm_projector is None:
            raise ModelError("this model reads text only", "choose a vision-language model to ask about pictures")
        if isinstance(images, Tiles) or model.image_newline is not None:
            return self._encode_tiles(tower, images), [1] * len(images)
        if isinstance(images, Tensor) and images.dim() == 4:
            return self._features(tower, images), [1] * len(images)
        if not len(images):
            return self.get_input_embeddings().weight.new_zeros(0, 0, model.mm_projector.config.hidden_size), []  # type: ignore[attr-defined]
        groups = [image[None] if image.dim() == 3 else image for image in images]
        return self._features(tower, torch.cat(groups)), [len(group) for group in groups]

    def _encode_tiles(self, tower: Any, images: Tensor | list[Tensor] | Tiles) -> list[Tensor]:
        """`[n, D]` a picture. All tiles of all pictures go through the tower together."""
        tiling, newline = self.get_model().tiling, self.get_model().image_newline
        if not isinstance(images, Tiles):
            remedy = "give tinychat.tiling.Tiles, as a Processor's pixels are"
            raise UsageError("the model cuts its pictures into tiles, and pixels came without sizes", remedy)
        if tiling is None:
            raise UsageError("the model looks at whole pictures, and tiles came", "give pixels [B, 3, H, W]")
        if not len(images):
            return []
        features = self._features(tower, torch.cat(images.pixels)).split([len(tiles) for tiles in images.pixels])
        pairs = zip(features, images.sizes, strict=True)
        return [pack_tiles(tiles, tiling, size, newline) for tiles, size in pairs]

    def _features(self, tower: Any, pixels: Tensor) -> Tensor:
        """What tower and projector make of pictures. Beside the CPU kernels torch's own threads stand in the way."""
        in_one_call = getattr(tower, "one_call", None) is not None and not torch.is_grad_enabled()
        with one_thread() if in_one_call else nullcontext():
            return self.get_model().mm_projector(tower(pixels))

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        past_key_values: Any,
        labels: Tensor | None,
        images: Tensor | list[Tensor] | Tiles | None,
    ) -> Multimodal:
        """Ids with IMAGE_TOKEN_INDEX and pictures -> (None, position_ids, attention_mask, past, embeds, labels).

        Without pictures, or for one token after a prefill, the inputs come back as they are with embeds None. What
        was None stays None, but for a mask where rows of unequal length had to be padded. Rows are cut, with a warning,
        to config.tokenizer_model_max_length and padded on config.tokenizer_padding_side; picture and padding positions
        have the label IGNORE_INDEX. Raises UsageError where placeholders and pictures differ in number.
        """
        if images is None or input_ids is None or (input_ids.shape[1] == 1 and past_key_values is not None):
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        batch = self.fuse(input_ids, attention_mask, labels, images)
        mask = None
        if attention_mask is not None or not bool(batch.mask.all()):
            mask = batch.mask.to(attention_mask.dtype if attention_mask is not None else torch.bool)
        positions = batch.position_ids if position_ids is not None else None
        return None, positions, mask, past_key_values, batch.embeds, batch.labels if labels is not None else None

    def fuse(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        images: Tensor | list[Tensor] | Tiles,
    ) -> vila_fusion.Batch:
        """ids `[B, T]` with placeholders, and pictures -> one padded batch of embeddings; see the method above."""
        keep = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        _check_shapes(input_ids, attention_mask=keep, labels=labels)
        targets = torch.full_like(input_ids, IGNORE_INDEX) if labels is None else labels
        features, counts = self._encode(images)
        placeholders = int((input_ids[keep] == IMAGE_TOKEN_INDEX).sum())
        blocks = iter(vila_fusion.split_blocks(counts, features, placeholders))
        text = self.embed_text(input_ids.clamp(min=0))
        rows = [
            vila_fusion.fuse_row(input_ids[i][keep[i]], targets[i][keep[i]], text[i][keep[i]], blocks)
            for i in range(len(input_ids))
        ]
        limit, longest = self.config.tokenizer_model_max_length, max(len(row.labels) for row in rows)
        if limit is not None and longest > limit:
            warnings.warn(f"a row of {longest} tokens is cut to tokenizer_model_max_length = {limit}", stacklevel=3)
        return vila_fusion.pad_rows(rows, limit, self.config.tokenizer_padding_side)

    def initialize_vision_tokenizer(self, model_args: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        """Add LLaVA's picture tokens to tokenizer and embeddings; new rows are the mean of the old ones.

        mm_use_im_patch_token adds <im_patch>, mm_use_im_start_end adds <im_start> and <im_end>; with
        pretrain_mm_mlp_adapter the latter two rows are read from that file (`model.embed_tokens.weight`). With
        tune_mm_mlp_adapter the head is frozen, and the embeddings are trained only where tokens were to be added.
        """
        marks = getattr(model_args, "mm_use_im_start_end", False)
        if getattr(model_args, "tune_mm_mlp_adapter", False):
            self._train_tables(bool(marks))
        if getattr(model_args, "mm_use_im_patch_token", False):
            self._add_tokens(tokenizer, [IMAGE_PATCH_TOKEN])
        if marks:
            added = self._add_tokens(tokenizer, [IMAGE_START_TOKEN, IMAGE_END_TOKEN])
            if added and (adapter := getattr(model_args, "pretrain_mm_mlp_adapter", None)):
                self._copy_token_rows(Path(adapter), added)

    @torch.no_grad()
    def _add_tokens(self, tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> list[int]:
        """The ids of the tokens that are new. Their rows become the mean of the tokenizer's old ones.

        A vocabulary that is padded beyond the tokenizer is not cut.
        """
        known = len(tokenizer)
        tokenizer.add_tokens(tokens, special_tokens=True)
        ids = list(range(known, len(tokenizer)))
        tables: list[Tensor] = [self.get_input_embeddings().weight]  # type: ignore[attr-defined]
        if len(tokenizer) > len(tables[0]):
            self.resize_token_embeddings(len(tokenizer))  # type: ignore[attr-defined]
        tables = [self.get_input_embeddings().weight, self.get_output_embeddings().weight]  # type: ignore[attr-defined]
        for table in tables:
            table[ids] = table[:known].mean(0)
        return ids

    def _train_tables(self, embeddings: bool) -> None:
        self.get_output_embeddings().requires_grad_(False)  # type: ignore[attr-defined]
        self.get_input_embeddings().requires_grad_(embeddings)  # type: ignore[attr-defined]

    @torch.no_grad()
    def _copy_token_rows(self, path: Path, ids: list[int]) -> None:
        state = _read_adapter(path)
        remedy = "give an adapter that was trained with this model"
        if (rows := state.get("model.embed_tokens.weight")) is None:
            raise ModelError(f"{path} holds no model.embed_tokens.weight", remedy)
        table: Tensor = self.get_input_embeddings().weight  # type: ignore[attr-defined]
        if rows.shape[1] != table.shape[1] or len(rows) < len(ids):
            shapes = f"{list(rows.shape)}, the model has {list(table.shape)} and {len(ids)} new rows"
            raise ModelError(f"{path} holds embeddings {shapes}", remedy)
        table[ids] = rows[-len(ids) :].to(table)


def _tower_config(tower: Any) -> dict[str, Any]:
    """From a dict, a transformers config, or a folder. Raises UsageError for anything else."""
    if isinstance(tower, dict):
        return dict(tower)
    if isinstance(tower, (str, Path)):
        return read_json(Path(tower) / "config.json")
    if not hasattr(tower, "to_dict"):
        raise UsageError(f"mm_vision_tower is a {type(tower).__name__}", "give a config, a dict or a folder")
    return tower.to_dict()


def _tower_weights(model_args: Any) -> Weights | None:
    tower = getattr(model_args, "mm_vision_tower", None)
    if not isinstance(tower, (str, Path)):
        return None
    return Weights(Index.of(("vision_tower.", Path(tower))).renamed("vila"), "vision_tower")


def _read_adapter(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ModelError(f"there is no file {path}", "give the adapter's file, often mm_projector.bin")
    return torch.load(path, map_location="cpu", weights_only=True)


def _check_shapes(input_ids: Tensor, **others: Tensor | None) -> None:
    """Raise UsageError where a mask or labels do not have the ids' shape."""
    for name, tensor in others.items():
        if tensor is not None and tensor.shape != input_ids.shape:
            raise UsageError(f"{name} has shape {list(tensor.shape)}, the ids {list(input_ids.shape)}", "give one each")
