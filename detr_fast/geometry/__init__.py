"""Boxes, line segments and segment ids: pure functions without state."""
