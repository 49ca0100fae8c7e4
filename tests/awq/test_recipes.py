"""Recipes name what decoder layers have, and unknown architectures are refused."""

from __future__ import annotations

import pytest
import torch
from decoder_blocks import decoder_block
from torch import nn

from awq.errors import RecipeError
from awq.recipes import RECIPES, recipe_for


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_recipes_name_every_linear_of_transformers_layers(family: str) -> None:
    block = decoder_block(family).module
    linears = {name for name, part in block.named_modules() if isinstance(part, nn.Linear)}
    recipe = recipe_for(family)
    assert {name for group in recipe.groups for name in group.linears} == linears
    assert set(recipe.unclipped) <= linears
    for group in recipe.groups:
        assert isinstance(block.get_parameter(f"{group.previous}.weight"), torch.Tensor)
        inspected = block.get_submodule(group.inspect)
        assert all(block.get_submodule(name) in inspected.modules() for name in group.linears)


def test_vlm_types_have_their_decoders_recipe() -> None:
    assert recipe_for("vila_llama") is recipe_for("llava_qwen") is recipe_for("llama")


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(RecipeError, match="no AWQ recipe for model type 'mamba'; known are llama, mistral, qwen2"):
        recipe_for("mamba")
    assert "mamba" not in RECIPES
