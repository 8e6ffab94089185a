"""Readers of data sets: each gives `datasets.Dataset` tables with one schema a task. Knows no models or methods."""
