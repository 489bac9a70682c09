"""Every error that jahubert raises on purpose.

An error says what is wrong, where, what was found and what to do next. `UserError` is for whatever a
file, an option or a machine's setup can cause: the two command lines print its message without a
traceback and leave with its `exit_status`.
"""


class JahubertError(Exception):
    """Base of all errors raised on purpose; a traceback is worth showing."""

    exit_status = 1


class Stopped(JahubertError):
    """A training was told to stop, in all its processes, and has saved; the same command continues it."""

    exit_status = 75  # EX_TEMPFAIL: a scheduler may queue it again


class UserError(JahubertError):
    """Somebody can mend this without reading code: the message is enough."""

    exit_status = 2


class ConfigError(UserError):
    """One or several mistakes in a configuration, all of them in one message."""


class AudioError(UserError):
    """A file or array that is not usable audio."""


class DataError(UserError):
    """A manifest, label store, corpus or target that is missing, broken or does not fit another one."""


class CheckpointError(UserError):
    """A model folder or file that cannot be read, or that is not what was asked for."""


class DiskFullError(UserError):
    """No room is left to write in; the same command may be started again when there is."""

    exit_status = 1


class StaleError(UserError):
    """A finished or started folder that was made with other settings than the ones asked for."""


class BusyError(UserError):
    """A folder in which another run is at work."""


class MissingExtraError(UserError, ImportError):
    """An optional package is needed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str):
        super().__init__(f"{package} is not installed. Install it with: pip install 'jahubert[{extra}]'")
        self.package, self.extra = package, extra
