"""Fused operations of the head. Needs torch and triton only."""
