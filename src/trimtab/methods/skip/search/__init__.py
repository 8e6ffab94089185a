"""Searches for the blocks to skip, one file each."""
