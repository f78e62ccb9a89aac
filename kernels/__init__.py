"""GPU kernels and their torch twins: imports torch and triton only, nothing else of ours."""
