"""Predicts the memory and the time of a run on any number of GPUs, without having one."""
