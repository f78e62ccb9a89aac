"""Executes scheduled steps: keeps sequences, builds tensors, runs the model, samples tokens."""
