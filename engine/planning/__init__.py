"""Will it fit, how fast: memory and time of a run on any number of GPUs, predicted without one."""
