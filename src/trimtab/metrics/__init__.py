"""Metrics that give the numbers of the official evaluation code, on plain lists, dicts and tensors.

One file a metric; none knows a task or a reader. Every function says whose number it gives and what it refuses. The
official programs are named in the docstrings; they were read, and the numbers compared, to 1e-6.
"""
