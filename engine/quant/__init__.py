"""Quantized weights: formats of checkpoints, the canonical weights they become, the forms these run in."""
