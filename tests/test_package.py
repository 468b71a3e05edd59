"""What the package promises before any work is done."""

import re
import resource
import subprocess
import sys
from pathlib import Path

import msq

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "numpy", "zarr", "av", "open_clip", "timm", "rich.progress", "dask", "h5py")


def python(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=True, cwd=cwd
    )


def test_import_is_clean_and_loads_nothing_heavy():
    code = f"import msq, sys; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = python("-W", "error", "-c", code)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


def test_every_public_name_loads():
    for name in msq.__all__:
        assert getattr(msq, name) is not None
    assert msq.metrics is msq.head.metrics


def test_help_is_quick_and_loads_nothing_heavy():
    best = min(_seconds("-m", "msq", "--help") for _ in range(5))
    assert best < 0.5
    code = (
        "import sys; sys.argv = ['msq', '--help']\n"
        "from msq.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"sys.stderr.write(str([m for m in {HEAVY[:-3]!r} if m in sys.modules]))"
    )
    assert python("-c", code).stderr == "[]"


def _seconds(*arguments):
    """Seconds of processor time: what else the machine does is no fault of the command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    python(*arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_no_folder_of_the_repository_shadows_the_package_kernels(tmp_path):
    # `python -c` puts the current folder on the import path, as `python -m pytest` does.
    code = "from importlib.util import find_spec as f; s = f('kernels'); print(s and s.origin)"
    assert not python("-c", code, cwd=ROOT).stdout.startswith(str(ROOT))
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    assert python("-c", code, cwd=tmp_path).stdout.startswith(str(tmp_path))  # it would be seen


def test_modules_have_no_main_block_and_import_absolutely():
    for file in sorted((ROOT / "msq").rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        if file.name != "__main__.py":
            assert not re.search(r"^if __name__ ==", text, re.MULTILINE), file
        assert not re.search(r"^\s*from \.", text, re.MULTILINE), file
        assert not re.search(r"^\s*(import|from) kernels\b", text, re.MULTILINE), file


def test_rooms_depend_one_way():
    forbidden = {
        "kernels": ("extract", "head", "report", "world", "demo", "cli", "api", "bench"),
        "extract": ("head", "report", "demo", "cli", "api", "bench"),
        "head": ("report", "demo", "cli", "world", "api", "bench"),
        "world": ("head", "report", "demo", "cli", "api", "bench"),
        "report": ("cli", "api", "demo"),
        "api": ("cli", "demo", "world", "bench"),
        "bench": ("report", "demo", "cli", "api", "world"),
    }
    for room, others in forbidden.items():
        pattern = re.compile(rf"^\s*(from|import) msq\.({'|'.join(others)})\b", re.MULTILINE)
        for file in sorted((ROOT / "msq" / room).rglob("*.py")):
            found = pattern.search(file.read_text(encoding="utf-8"))
            assert not found, f"{file}: {found and found.group()}"


def test_head_reaches_into_extract_only_inside_functions():
    for file in sorted((ROOT / "msq" / "head").rglob("*.py")):
        at_top = re.search(
            r"^(from|import) msq\.extract", file.read_text(encoding="utf-8"), re.MULTILINE
        )
        assert not at_top, file
