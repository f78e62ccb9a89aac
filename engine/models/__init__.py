"""Model architectures: one small file per family over one shared decoder."""
