"""What a user can mend, said in one line each: where, what was found, what was expected."""


class UserError(ValueError):
    """Something the user can mend. Commands print its lines and exit with code 2; anything else is a bug."""


class ConfigError(UserError):
    """A configuration file or an override is wrong; one line per mistake, all of them at once."""


class DataError(UserError):
    """A log or a dataset is not what it should be."""


class CheckpointError(UserError):
    """A run directory or a checkpoint cannot be used."""


def first_line(error: BaseException) -> str:
    """The first line of what a library's error says, or its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]
