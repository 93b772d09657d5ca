"""halfbyte: quantize, serve and measure Mistral-Medium-class models in mixed NVFP4/FP8."""

__version__ = "0.1.0"
