"""Builds the model on megatron-core with its heads, and reads and writes Hugging Face checkpoints."""

# prepares megatron-core before any module here imports it
import silva.engine.parallel  # noqa: F401
