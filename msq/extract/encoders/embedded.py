"""The two small encoders inside the package, which work without any network.

They were trained on msq's generated world only and know nothing else; `training/` holds the script
and the record of how.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Final, Literal

from msq.errors import WeightsError

EMBEDDED_VIDEO: Final = "timesformer-embedded"
EMBEDDED_CLIP: Final = "clip-embedded"
EMBEDDED_FRAMES = 8


def embedded_folder(name: Literal["timesformer-embedded", "clip-embedded"]) -> Path:
    """The folder of an embedded encoder's weights.

    Raises:
        WeightsError: if this installation lacks it.
    """
    folder = Path(str(files("msq") / "weights" / name))
    if not folder.is_dir():
        raise WeightsError(
            f"the embedded encoder {name} is not part of this installation (expected {folder}); "
            "reinstall msq, or name other weights"
        )
    return folder
