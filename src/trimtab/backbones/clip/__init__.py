"""The family of `clip`: description, model, official files, features for tasks."""
