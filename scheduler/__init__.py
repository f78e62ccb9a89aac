"""Requests, sequences, blocks and what runs next: pure Python, never a tensor."""
