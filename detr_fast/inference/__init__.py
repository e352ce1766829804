"""A finished model: loaded, evaluated, and put to work on files."""
