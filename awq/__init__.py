"""The quantizer: a model -> calibrate -> scale and clip search -> pack -> a checkpoint. It knows no runtime."""
