"""The family of `clip4clip`: description, model, official files, features for tasks."""
