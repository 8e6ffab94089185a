"""The family of `siglip`: description, model, official files, features for tasks."""
