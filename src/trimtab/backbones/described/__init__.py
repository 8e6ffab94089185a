"""Descriptions of transformers' own classes, one file a family."""
