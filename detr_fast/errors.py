"""Errors that concern the user's request, or the run as a whole."""


class UsageError(ValueError):
    """What the user asked for cannot be done as asked; the message says why and is all that needs to be shown."""


class NonFiniteLossError(RuntimeError):
    """Training met NaN or infinity; the message says where it first appears. The optimiser has not taken that step."""


class CallbackError(RuntimeError):
    """A callback of a training run failed; the message says which, and what it raised."""


class InterruptedRun(RuntimeError):
    """A run stopped because of a signal, with everything saved; the message says how to go on.

    Attributes:
        where: the message without `advice`.
        signal: its number; a program ends with exit code 128 + signal.
    """

    def __init__(self, where: str, signal: int, advice: str = ""):
        super().__init__(f"{where}. {advice}" if advice else where)
        self.where, self.signal = where, signal
