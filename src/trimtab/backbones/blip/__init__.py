"""The family of `blip`: description, model, official files, features for tasks."""
