"""What the bits mean: minifloats, FP8 and NVFP4, their scales and their packing."""
