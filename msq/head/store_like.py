"""What stage two asks of a feature store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

MISSING, OK, FAILED, DEGRADED = 0, 1, 2, 3  # the store's `status`


class StoreLike(Protocol):
    """The part of a feature store that is read here (`msq.extract.store.FeatureStore` has it)."""

    @property
    def name(self) -> str:
        """Name of the dataset."""

    @property
    def task(self) -> Any:
        """`multilabel` or `singlelabel`."""

    @property
    def classes(self) -> Sequence[str]:
        """Class names, K."""

    @property
    def clips(self) -> Sequence[str]:
        """Ids of all N clips."""

    @property
    def splits(self) -> Sequence[str]:
        """Split of each clip."""

    def encoders(self, kind: str | None = None) -> Sequence[str]:
        """Names of the encoders of one kind: `video`, `image`, `text`."""

    def spec(self, encoder: str, kind: str | None = None) -> Any:
        """How an encoder's arrays were made; image and text towers may share a name."""

    def status(self, encoder: str, view: int = 0) -> Any:
        """[N] status codes."""

    def tokens(self, rows: Any, encoder: str | None = None, view: int = 0) -> Tensor:
        """[rows, S, D']."""

    def image(self, rows: Any, encoder: str | None = None, view: int = 0) -> Tensor:
        """[rows, D'']."""

    def labels(self, rows: Any = None) -> Tensor:
        """[rows, K]."""

    def text(self, encoder: str | None = None, prompt: str | None = None) -> Tensor:
        """[K, D]."""
