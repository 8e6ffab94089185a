"""The family of `vilt`: description, model, official files, features for tasks."""
