"""Files of a repository on the hub, and what it means where one cannot be had.

A name at which there is nothing (no such repository, revision or file, one that this user may not
read, or nothing of it in the cache of a user who has switched the network off) is
`WeightsNotFound`: the same command will not do better. A network that fails is a `WeightsError`:
it may.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from msq.errors import WeightsError, WeightsNotFound

COPY = "copy the repository's files to a folder and give local-dir:PATH"


class HubRepository:
    """Files of a repository, one by one.

    Attributes:
        unreachable: why a file could be neither fetched nor found in the cache, if that happened.
        unknown: files of which it cannot be said without network whether they exist.
    """

    def __init__(self, repository: str, label: str) -> None:
        """Nothing is fetched yet.

        Args:
            repository: `org/name[@revision]`.
            label: what it is called in errors.
        """
        self._label = label
        self._repo, _, revision = repository.partition("@")
        self._revision = revision or None
        self.unreachable: WeightsError | None = None
        self.unknown: list[str] = []

    @property
    def name(self) -> str:
        """Last part of the repository's name."""
        return self._repo.rsplit("/", 1)[-1]

    def fetch(self, filename: str) -> Path | None:
        """The file on this machine; None where there is none, or none can be had now.

        Raises:
            WeightsNotFound: no such repository or revision, or not for this user.
            WeightsError: the network failed on the way.
        """
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            # Each try without a network takes the client half a minute: once is enough.
            only_cache = self.unreachable is not None
            return Path(
                hf_hub_download(
                    self._repo, filename, revision=self._revision, local_files_only=only_cache
                )
            )
        except LocalEntryNotFoundError as error:  # no network, and not in the cache
            self.unreachable = self.unreachable or self._error(error, filename)
            if not self._known_absent(filename):
                self.unknown.append(filename)
            return None
        except EntryNotFoundError:  # not in the repository
            return None
        except _client_errors() as error:
            raise self._error(error, filename) from error

    def fetch_any(self, filenames: Iterable[str]) -> Path | None:
        """The first of these that can be had."""
        return next((path for name in filenames if (path := self.fetch(name)) is not None), None)

    def without(self, filenames: Sequence[str]) -> WeightsError:
        """The error for a repository of which none of these could be had."""
        if self.unreachable is not None:
            return self.unreachable
        return WeightsNotFound(
            f"{self._label}: could not be fetched: the repository has none of "
            f"{', '.join(filenames)}; is it the right one?"
        )

    def _error(self, error: Exception, filename: str) -> WeightsError:
        return hub_error(error, self._label, filename, COPY)

    def _known_absent(self, filename: str) -> bool:
        """Whether the cache remembers that the repository does not have the file."""
        from huggingface_hub import try_to_load_from_cache

        found: object = try_to_load_from_cache(self._repo, filename, revision=self._revision)
        return found is not None and not isinstance(found, str)


def hub_error(error: BaseException, label: str, filename: str, without: str) -> WeightsError:
    """What an error of the hub's client means, by the first of its own in the chain of causes.

    Args:
        error: as a library raised it.
        label: what could not be fetched.
        filename: of it.
        without: what to do without network.

    Returns:
        WeightsNotFound where the name is to blame or the network is switched off; WeightsError
        where the network failed.
    """
    from huggingface_hub import constants, errors

    not_found = [
        (errors.HFValidationError, "no name of a repository (expected org/name)"),
        (
            errors.GatedRepoError,
            "a gated repository: ask for access on its page, and log in (HF_TOKEN)",
        ),
        (errors.DisabledRepoError, "access to this repository is disabled"),
        (
            errors.RepositoryNotFoundError,
            "no such repository, or a private one: check the name, or log in (HF_TOKEN)",
        ),
        (errors.RevisionNotFoundError, "the repository has no such revision"),
        (errors.EntryNotFoundError, f"the repository has no {filename}"),
    ]
    chain = list(_chain(error))
    begun = f"{label}: could not be fetched: "
    local = any(isinstance(one, errors.LocalEntryNotFoundError) for one in chain)
    if local and constants.HF_HUB_OFFLINE:
        return WeightsNotFound(
            f"{begun}HF_HUB_OFFLINE is set, and the cache {constants.HF_HUB_CACHE} has no "
            f"{filename} of it. Unset HF_HUB_OFFLINE, or set HF_HOME to the folder of a cache that "
            f"has it. Without network, {without}"
        )
    others = [one for one in chain if not isinstance(one, errors.LocalEntryNotFoundError)]
    for kind, reason in not_found:
        if any(isinstance(one, kind) for one in others):
            return WeightsNotFound(f"{begun}{reason}. Without network, {without}")
    # Of a failed network the client says that it should be looked at; its cause says more.
    place = next((k for k, one in enumerate(chain) if one not in others), -1)
    cause = chain[place + 1] if place + 1 < len(chain) else chain[place]
    said = str(cause).strip() or type(cause).__name__
    cache = "set HF_HOME to the folder of a cache that has it, or " if local else ""
    return WeightsError(
        f"{begun}{filename}: {said.splitlines()[0].rstrip('.')}. Without network, {cache}{without}"
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _client_errors() -> tuple[type[Exception], ...]:
    """What `hf_hub_download` raises: its own, those of the HTTP library that it uses, OSError."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    return (OSError, HFValidationError, *HfHubHTTPError.__bases__)
