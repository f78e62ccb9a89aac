"""Offline batches in OpenAI's file format: requests as lines in, results as lines out."""
