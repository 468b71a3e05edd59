"""Weights behind a plain address: fetched once, into the folder that torch.hub keeps."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlparse

import torch

from msq.errors import WeightsError


def fetch_url(url: str, label: str, remedy: str) -> Path:
    """The file behind an address, from torch.hub's cache where it is there (`TORCH_HOME`).

    Args:
        url: where it is; a hash in the name (`NAME-0123abcd.pth`) is checked.
        label: what the weights are called, for errors.
        remedy: what to do without network, for errors.

    Raises:
        WeightsError: if it cannot be fetched, or is not what its name says.
    """
    name = Path(urlparse(url).path).name
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.is_file():
        return path
    match = re.search(r"-([0-9a-f]{8,})\.", name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(
            url, str(path), hash_prefix=match[1] if match else None, progress=False
        )
    except (OSError, RuntimeError) as error:
        raise WeightsError(
            f"weights {label}: could not be fetched from {url}: {error}. {remedy}"
        ) from error
    return path
