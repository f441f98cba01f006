"""Process groups, and what megatron-core needs to run without a GPU.

Importing this package prepares megatron-core for the CPU where there is no GPU; it has to happen before the
first `import megatron`.
"""

from silva.engine.parallel.emulation import install

install()
