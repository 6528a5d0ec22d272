"""The exceptions that lowbit raises on purpose.

LowbitError
 +- FormatError        a number format or scheme that does not exist or does not fit the matrix
 +- CheckpointError    a file or directory that is damaged, incomplete or hostile
 +- UnsupportedError   well-formed input that lowbit cannot run; the text says what it can
 +- RequestError       a generation request outside the limits of the model
 +- BusyError          more work is waiting than the engine may hold; come back later

Each message gives the operation, the value received, the limit and the remedy.
"""


class LowbitError(Exception):
    """Base of every error that lowbit raises on purpose."""


class FormatError(LowbitError, ValueError):
    """A number format or scheme that does not exist or does not fit the matrix."""


class CheckpointError(LowbitError, ValueError):
    """A file or directory that is damaged, incomplete or hostile."""


class UnsupportedError(LowbitError):
    """Well-formed input that lowbit cannot run."""


class RequestError(LowbitError, ValueError):
    """A generation request outside the limits of the model."""


class BusyError(LowbitError):
    """More work is waiting than the engine may hold; `retry_after_seconds` says when to come back."""

    def __init__(self, message: str, retry_after_seconds: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds
