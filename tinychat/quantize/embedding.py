"""Prompts become hidden states as at inference: pictures through tower and projector, then the embeddings.

The tower's layers may be read one at a time, each when it is its turn; of the embeddings the rows that occur.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from tinychat.checkpoint import EMBEDDINGS, Index
from tinychat.inputs.processor import Processor, Prompt
from tinychat.load import empty_model
from tinychat.models.vila_llama import VilaLlamaForCausalLM
from tinychat.quantize.job import Source, part


class Rows(nn.Module):
    """An embedding that stays on the disk: the rows of the ids at hand are read, in float32."""

    def __init__(self, index: Index, device: torch.device) -> None:
        super().__init__()
        self.index, self.device = index, device

    def forward(self, ids: Tensor) -> Tensor:
        """ids `[T]` -> `[T, D]`."""
        used, places = ids.cpu().unique(return_inverse=True)
        table = Index({EMBEDDINGS: self.index.entry(EMBEDDINGS)}).get(EMBEDDINGS)
        return table[used].to(self.device, torch.float32)[places.to(self.device)]


class Embedder:
    """The parts of a model that come before the decoder's layers. `stream`: the tower's layers are not kept."""

    def __init__(self, source: Source, processor: Processor, device: torch.device, stream: bool) -> None:
        self.processor, self.device = processor, device
        self.model = _front(source, device)
        for name in ("vision_tower", "mm_projector"):
            if isinstance(module := getattr(self.model, name), nn.Module):
                self._fill(module, part(source.index, f"{name}."), stream)
        if (name := "image_newline") in source.index:
            fill(self.model, Index({name: source.index.entry(name)}), device)

    @torch.no_grad()
    def embed(self, prompts: Sequence[Prompt], seqlen: int) -> Iterator[Tensor]:
        """`[T, D]` float32 of each prompt, cut to seqlen tokens."""
        for prompt in prompts:
            used = [slot for slot in prompt.slots if slot.start < seqlen]
            features = [self._look(prompt, slot.image) for slot in used]
            end = max([seqlen, *(slot.end for slot in used)])
            ids = torch.tensor(prompt.ids[:end], device=self.device)
            spans = [(slot.start, slot.end) for slot in used]
            yield self.model.embed(ids, spans, features)[0, :seqlen]

    def _look(self, prompt: Prompt, image: int) -> Tensor:
        pixels = self.processor.pixels(prompt, [image]).to(self.device)
        return self.model.encode_images(pixels)[0]

    def _fill(self, module: nn.Module, index: Index, stream: bool) -> None:
        """Read the weights of a part; with `stream` those of its layers come and go with their calls."""
        lists = [name for name, child in module.named_modules() if isinstance(child, nn.ModuleList)]
        layers = [f"{name}.{i}" for name in lists for i in range(len(module.get_submodule(name)._modules))]
        layers = layers if stream else []
        beginnings = tuple(f"{name}." for name in layers)
        resident = [name for name in index.names() if not (beginnings and name.startswith(beginnings))]
        fill(module, Index({name: index.entry(name) for name in resident}), self.device)
        for name in layers:
            layer, weights = module.get_submodule(name), part(index, f"{name}.")
            layer.register_forward_pre_hook(_filler(weights, self.device))
            layer.register_forward_hook(_emptied)


def fill(module: nn.Module, index: Index, device: torch.device) -> None:
    """Give a module the values of an index: parameters in float32, 8-bit weights and their scales as they are."""
    for name, tensor in index.stream():
        parent, _, leaf = name.rpartition(".")
        owner = module.get_submodule(parent)
        if leaf in dict(owner.named_buffers(recurse=False)):
            setattr(owner, leaf, tensor.to(device, copy=True))
        else:
            value = tensor.to(device, torch.float32, copy=True)
            setattr(owner, leaf, nn.Parameter(value, requires_grad=False))


def _filler(weights: Index, device: torch.device) -> Callable[[nn.Module, object], None]:
    return lambda module, _args: fill(module, weights, device)


def _emptied(module: nn.Module, _args: object, _output: object) -> None:
    module.to_empty(device="meta")


def _front(source: Source, device: torch.device) -> VilaLlamaForCausalLM:
    """The model without decoder layers, on the meta device but for what is filled."""
    model = empty_model(source.config, torch.float32, int8=source.int8)
    model.llm.model.layers = nn.ModuleList()
    model.set_submodule("llm.model.embed_tokens", Rows(source.index, device))
    return model.eval()
