"""The Triton kernels, one file each: oracle, kernel, launcher, SPECS. docs/kernels.md says how to add one."""
