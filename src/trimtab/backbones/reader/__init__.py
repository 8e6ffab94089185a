"""The family of `reader`: description, model, official files, features for tasks."""
