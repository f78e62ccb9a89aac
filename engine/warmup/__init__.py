"""Which kernels serving a model needs, and how they are built before anybody waits for them."""
