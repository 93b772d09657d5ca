"""CUDA C++ kernels for Hopper, compiled at run time with NVRTC and launched through the driver."""
