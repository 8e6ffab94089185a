"""The family of `xvlm`: description, model, official files, features for tasks."""
