"""The family of `clip_vil`: description, model, official files, features for tasks."""
