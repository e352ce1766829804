"""Errors that concern the user's request, or the run as a whole."""


class UsageError(ValueError):
    """What the user asked for cannot be done as asked; the message says why and is all that needs to be shown."""


class NonFiniteLossError(RuntimeError):
    """Training met NaN or infinity; the message says where it first appears. The optimiser has not taken that step."""
