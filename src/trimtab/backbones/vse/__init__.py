"""The family of `vse`: description, model, official files, features for tasks."""
