"""Every tiny model of the tests, once."""
