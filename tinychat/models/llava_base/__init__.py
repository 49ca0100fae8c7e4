"""The vision-language layer under VILA and LLaVA models."""
