"""What may be scaled in a layer, as data: by AWQ in a decoder's, by SmoothQuant in a vision encoder's.

To add an architecture, add a row to RECIPES or to ENCODERS.

Names are relative to the layer and are those in memory, whatever a checkpoint calls them.
"""

from __future__ import annotations

from dataclasses import dataclass

from awq.errors import RecipeError


@dataclass(frozen=True)
class ScaleGroup:
    """`linears` read what `previous` (a norm or a linear) puts out; a scale moves from one to the others.

    The scale is judged by the output of the module `inspect`. A previous linear whose width is not that of the inputs
    (values of grouped-query attention) leaves the group unscaled.
    """

    previous: str
    linears: tuple[str, ...]
    inspect: str


@dataclass(frozen=True)
class Recipe:
    """The groups in the order of the forward pass, and the linears whose weights are never clipped."""

    groups: tuple[ScaleGroup, ...]
    unclipped: tuple[str, ...] = ()


GATED_DECODER = Recipe(
    groups=(
        ScaleGroup("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn"),
        ScaleGroup("self_attn.v_proj", ("self_attn.o_proj",), "self_attn.o_proj"),
        ScaleGroup("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp"),
        ScaleGroup("mlp.up_proj", ("mlp.down_proj",), "mlp.down_proj"),
    ),
    unclipped=("self_attn.q_proj", "self_attn.k_proj"),  # clipped, they would change which token looks at which
)

RECIPES = {
    "llama": GATED_DECODER,
    "mistral": GATED_DECODER,
    "qwen2": GATED_DECODER,
    "llava": GATED_DECODER,
    "llava_llama": GATED_DECODER,
    "llava_mistral": GATED_DECODER,
    "llava_qwen": GATED_DECODER,
    "vila_llama": GATED_DECODER,
}


def recipe_for(model_type: str) -> Recipe:
    """The recipe of a decoder by config.json's model_type. Raises RecipeError for one without."""
    if model_type not in RECIPES:
        raise RecipeError(f"there is no AWQ recipe for model type {model_type!r}", f"known are {', '.join(RECIPES)}")
    return RECIPES[model_type]


VISION_ENCODER = Recipe(  # fc2 comes after an activation, which no scale passes
    groups=(
        ScaleGroup("layer_norm1", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn"),
        ScaleGroup("self_attn.v_proj", ("self_attn.out_proj",), "self_attn.out_proj"),
        ScaleGroup("layer_norm2", ("mlp.fc1",), "mlp.fc1"),
    )
)

ENCODERS = {"clip": VISION_ENCODER, "siglip": VISION_ENCODER}


def encoder_recipe(family: str) -> Recipe:
    """The recipe of a vision tower. Raises RecipeError for one without."""
    if family not in ENCODERS:
        raise RecipeError(f"there is no recipe for the vision tower {family!r}", f"known are {', '.join(ENCODERS)}")
    return ENCODERS[family]
