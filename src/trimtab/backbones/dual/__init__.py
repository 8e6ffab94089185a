"""The family of `dual`: description, model, official files, features for tasks."""
