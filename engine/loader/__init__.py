"""Loading checkpoints: find the files, read tensors one at a time, fill the model."""
