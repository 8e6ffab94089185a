"""What runs left behind, as tables, plots and a page."""
