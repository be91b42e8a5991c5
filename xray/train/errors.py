"""The two ways a training run ends early on purpose; both carry one sentence for the user."""


class TrainError(ValueError):
    """A mistake that the user can put right: the message says what came and what is needed."""


class Stopped(Exception):
    """The run was asked to stop (Ctrl-C, SIGTERM), has saved its state, and the message says how to go on.

    Attributes:
        signal_number: the signal that asked for it, for the exit code (128 + number, as shells count).
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
