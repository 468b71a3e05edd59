from __future__ import annotations

import subprocess
import sys

BLOCKED = ("zarr", "typer", "rich", "av", "open_clip", "timm", "tomli_w", "dask", "h5py", "PIL",
           "transformers", "huggingface_hub", "sklearn")  # fmt: skip

PROGRAM = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, Blocker())
import pkgutil, importlib
import msq.config, msq.head
for module in pkgutil.walk_packages(msq.head.__path__, "msq.head."):
    importlib.import_module(module.name)
    print(module.name)
assert not [name for name in sys.modules if name.startswith("msq.extract")]
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_every_module_of_the_head_imports_with_torch_numpy_and_safetensors_alone() -> None:
    done = run(PROGRAM)
    assert done.returncode == 0, done.stderr
    assert {"msq.head.model", "msq.head.train", "msq.head.predict"} <= set(done.stdout.split())


def test_the_import_blocker_of_this_test_does_block() -> None:
    done = run(PROGRAM + "\nimport msq.extract.video")
    assert done.returncode != 0
    assert "blocked: " in done.stderr
