"""Errors that end a command with one line and an exit code of their own (0 is done)."""


class FastDDPMError(Exception):
    """Base of all errors shown to users; the message names what is wrong and what to do."""

    exit_code = 1


class NumericsError(FastDDPMError):
    """The loss or the gradient is no longer finite, or fp16's loss scale has collapsed."""

    exit_code = 3


class DataError(FastDDPMError):
    """The data set cannot be found, read or decoded, or does not have what the config asks for."""

    exit_code = 4


class ConfigError(FastDDPMError):
    """A field, a value or a combination of values that cannot be run."""

    exit_code = 5


class CheckpointError(FastDDPMError):
    """Weights or a checkpoint are missing, damaged or of another architecture."""

    exit_code = 6
