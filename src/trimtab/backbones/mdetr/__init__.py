"""The family of `mdetr`: description, model, official files, features for tasks."""
