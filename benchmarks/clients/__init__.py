"""Compares what other servers compute from exported models with transformers and with training."""
