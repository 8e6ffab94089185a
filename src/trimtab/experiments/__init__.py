"""Recipes and the runs that they stand for."""
