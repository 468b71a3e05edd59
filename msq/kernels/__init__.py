"""Fused operations of the head: references in PyTorch, Triton kernels in `gpu`, and which runs."""
