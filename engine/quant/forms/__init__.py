"""What a quantized weight is at run time: one class for each canonical kind, called with x."""
