"""Builds process groups, and prepares megatron-core to run without a GPU.

Importing this package makes megatron-core run on the CPU if there is no GPU; that has to happen before the first
`import megatron`. Where torch has new names for what megatron-core calls, it is given these.
"""

from silva.engine.parallel import emulation, torch_names

with torch_names.renamed():
    emulation.install()
    torch_names.import_megatron()
