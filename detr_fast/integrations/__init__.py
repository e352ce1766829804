"""Plugs for other people's code."""
