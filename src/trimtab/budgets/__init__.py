"""A budget in, a model out: limits, the space of candidates, what they cost, the search, and its page."""
