"""The family of `meter`: description, model, official files, features for tasks."""
