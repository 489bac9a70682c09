"""Exceptions raised by jahubert.

A message states what failed, where, what was found and what to do. `UserError` covers all errors caused by
files, options or the setup of a machine. Commands print its message without a traceback and exit with its
`exit_status`.
"""


class JahubertError(Exception):
    """Base class; shown with a traceback unless it is a `UserError`.

    Attributes:
        exit_status: exit status of the command if this error is not handled.
        reported: whether another process has already printed the message, so that it is not repeated.
    """

    exit_status: int = 1
    reported: bool = False


class Stopped(JahubertError):
    """Training stopped after a signal and saved a checkpoint; rerunning the same command resumes it.

    Attributes:
        signal: name of the signal, e.g. "SIGTERM"; None if another process received it.
    """

    exit_status = 75  # EX_TEMPFAIL: a scheduler may requeue the job

    def __init__(self, message: str = "", signal: str | None = None):
        super().__init__(message)
        self.signal = signal


class UserError(JahubertError):
    """An error that a user can fix from its message, without reading code."""

    exit_status = 2


class ConfigError(UserError):
    """One or more errors in a configuration, all listed in one message."""


class AudioError(UserError):
    """A file or array does not contain usable audio."""


class DataError(UserError):
    """A manifest, label store, corpus or target store is missing, corrupt or mismatched."""


class CheckpointError(UserError):
    """A model folder or file cannot be read, or is not of the required kind."""


class DiskFullError(UserError):
    """No space is left on a device; once there is space, rerunning the same command resumes the work."""

    exit_status = 1


class StaleError(UserError):
    """An existing output folder was created with different settings."""


class BusyError(UserError):
    """Another run is using a folder."""


class MissingExtraError(UserError, ImportError):
    """An optional package is not installed; the message names the extra that provides it."""

    def __init__(self, package: str, extra: str):
        super().__init__(
            f"{package} is not installed. Install the extra {extra}: "
            f"pip install 'jahubert[{extra}]', or in a clone pip install -e '.[{extra}]'"
        )
        self.package, self.extra = package, extra

    def __reduce__(self):
        return type(self), (self.package, self.extra)
