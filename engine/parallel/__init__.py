"""Builds process groups, and prepares megatron-core to run without a GPU.

Importing this package makes megatron-core run on the CPU if there is no GPU; that has to happen before the first
`import megatron`.
"""

from silva.engine.parallel.emulation import install

install()
