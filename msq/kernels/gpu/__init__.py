"""Triton kernels and their launches; everything else in `msq.kernels` does without Triton."""
