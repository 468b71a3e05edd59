"""Errors a user can act on. Each message says which file, what was expected, what was found.

The command line prints the message without a traceback and leaves with the error's exit code.
"""


class MsqError(Exception):
    """Base of every error that msq raises on purpose."""

    exit_code = 1


class MsqWarning(UserWarning):
    """What `msq.extract_features` and `msq.zero_shot` could not use, and went on without."""


class UsageError(MsqError):
    """A path or an option that cannot be used as given (exit code 2)."""

    exit_code = 2


class DatasetError(UsageError):
    """An annotation file or manifest that cannot be read at all."""


class VideoError(MsqError):
    """A video (or frame folder) from which no frame can be decoded."""


class WeightsError(MsqError):
    """Weights that are missing, of another architecture, or not finite."""


class WeightsNotFound(UsageError, WeightsError):
    """A path or a tag at which there are no weights (exit code 2)."""


class SpecMismatch(MsqError):
    """A store or run that was made in another way; the message holds the difference."""


class StoreError(MsqError):
    """A feature store that is incomplete, corrupt or asked for rows it does not have."""


class StoreNotFound(UsageError, StoreError):
    """A path at which there is no feature store (exit code 2)."""


class VerificationError(MsqError):
    """A check of finished work that failed (exit code 4)."""

    exit_code = 4


class PeerError(MsqError):
    """Another process of the same run ended with an error, and has said so (its exit code)."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


_NO_ROOM = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had, on a GPU or in this machine.

    cuBLAS and cuDNN say so by the name of their status, torch's allocators in words.
    """
    import torch  # not for `msq --help`

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_ROOM)
