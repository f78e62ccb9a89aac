"""Where steps are executed: in this process, or (for tests) without a model."""
