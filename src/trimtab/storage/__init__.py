"""Weights on disk: masks as bits, the sparse layout, shards, checkpoints."""
