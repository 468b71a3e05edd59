"""The room of the head's fused operations: none yet. What comes needs torch and triton only."""
