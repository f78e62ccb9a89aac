"""Joins the scheduler and the kernels: LLM, core loop, runner, models, loaders, command line."""
