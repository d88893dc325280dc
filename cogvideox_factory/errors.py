"""What can go wrong through no fault of ours, and the exit code each kind gets.

Every message gives the value, the law and the way out. All kinds are `ValueError`s, so a caller of the Python
API needs to know only that; the command line maps the class to the exit code.
"""


class FactoryError(ValueError):
    """A setting or request that cannot be carried out (exit code 2)."""

    exit_code = 2
    echoed = False
    """Raised here because another process of the run raised it, and tells the user."""


class DataError(FactoryError):
    """Rows, captions or clips that cannot be used (exit code 3)."""

    exit_code = 3


class MissingError(FactoryError):
    """A dependency, model or device that is not here (exit code 4)."""

    exit_code = 4


class ExhaustedError(FactoryError):
    """A device without enough memory for what was asked (exit code 4)."""

    exit_code = 4


class UnfitError(FactoryError):
    """A cache, checkpoint or weight file that is damaged or belongs to something else (exit code 5)."""

    exit_code = 5


class StorageError(FactoryError):
    """A disk that is full, read-only or failing (exit code 6)."""

    exit_code = 6


class NonFiniteError(FactoryError):
    """Training or sampling produced NaN or Inf (exit code 7)."""

    exit_code = 7


class PeerError(FactoryError):
    """Another process of the run ended or no longer answers (exit code 8)."""

    exit_code = 8


def nearest(name: str, choices: list[str]) -> str:
    """Return a ` (did you mean 'x'?)` hint for a mistyped `name`, or an empty string."""
    from difflib import get_close_matches

    match = get_close_matches(name, choices, n=1, cutoff=0.6)
    return f" (did you mean {match[0]!r}?)" if match else ""
