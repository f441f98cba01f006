"""Compares what Silva computes from a row of data with what transformers and TRL compute from the same row."""
