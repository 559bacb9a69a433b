"""The few kinds of error that a user can cause.

Each message is one line that names the file, the row or the field, and the mend. The command line prints
the message and exits with code 1 (2 for wrong usage); library callers catch `UniXError`.
"""


class UniXError(Exception):
    """A mistake that the user can mend; the message says where it is and how to mend it."""


class UsageError(UniXError):
    """Words on the command line that cannot be understood."""


class RecipeError(UniXError):
    """A recipe, or an override on the command line, that does not fit the schema."""


class ConfigError(UniXError, ValueError):
    """A model or tokenizer configuration that contradicts itself."""


class DataError(UniXError, ValueError):
    """A file, row or picture that cannot be read or does not fit the model."""


class InputError(UniXError, ValueError):
    """Ids, masks, labels or documents that a model cannot take."""


class RunError(UniXError):
    """A run folder or a machine on which a run cannot start or go on."""


class ProcessError(RunError):
    """What one of several processes that work together has met, and the others have not."""


class MissingExtraError(UniXError):
    """An optional package that is not installed."""

    def __init__(self, package: str, extra: str):
        super().__init__(f"this needs the package {package}: install it with `pip install 'uni-x[{extra}]'`")


def one_line(error: object, limit: int | None = None) -> str:
    """What an error of a library says, as one line of at most `limit` characters; its type where it says nothing."""
    return " ".join(str(error).split())[:limit] or type(error).__name__
