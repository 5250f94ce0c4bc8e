"""The services, one folder each, and the wiring that builds them from settings."""
