"""The model on megatron-core, its heads, and Hugging Face checkpoints in and out."""

import silva.engine.parallel  # noqa: F401  prepares megatron-core before any module here imports it
