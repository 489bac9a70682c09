"""Exceptions raised by jahubert.

A message states what failed, where, what was found and what to do. `UserError` covers whatever a file, an
option or the setup of a machine can cause: the command lines print its message without a traceback and exit
with its `exit_status`.
"""


class JahubertError(Exception):
    """Base class; shown with a traceback unless it is a `UserError`.

    Attributes:
        exit_status: exit status of a command that this error ends.
        reported: another process has already printed the message, so this one stays silent.
    """

    exit_status: int = 1
    reported: bool = False


class Stopped(JahubertError):
    """Training received a stop signal and saved a checkpoint; the same command resumes it.

    Attributes:
        signal: name of the signal, such as "SIGTERM"; None if another process received it.
    """

    exit_status = 75  # EX_TEMPFAIL: a scheduler may requeue the job

    def __init__(self, message: str = "", signal: str | None = None):
        super().__init__(message)
        self.signal = signal


class UserError(JahubertError):
    """An error that the user can fix without reading code: the message suffices."""

    exit_status = 2


class ConfigError(UserError):
    """One or more mistakes in a configuration, all in one message."""


class AudioError(UserError):
    """A file or array that is not usable audio."""


class DataError(UserError):
    """A missing, corrupt or mismatched manifest, label store, corpus or target."""


class CheckpointError(UserError):
    """A model folder or file that cannot be read or is not of the required kind."""


class DiskFullError(UserError):
    """No space left on a device; the same command resumes when space is available."""

    exit_status = 1


class StaleError(UserError):
    """An existing output folder that was made with other settings than the current ones."""


class BusyError(UserError):
    """A folder that another run is using."""


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
