"""Kernels that Triton compiles at their first call, where Triton is installed."""
