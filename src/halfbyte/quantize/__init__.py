"""The post-training quantization pipeline: scales, layers, export, report."""
