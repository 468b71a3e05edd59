"""Files of a folder of claims: one for each process, locked, and hard links to it.

- On one machine the kernel frees the lock of a process that died, so its claims are free at once.
- Between machines `flock` may not reach; a claim counts as dead when its file was not touched for
  `AGE` seconds by the clock of the file server.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msq.errors import StoreError
from msq.extract.atomic import make_directory

BEAT = 10.0  # seconds between two touches
AGE = 90.0  # seconds without a touch after which a claim of another machine is dead
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def machine() -> str:
    """This machine since it was started, as `flock` knows it; containers count as machines."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    text = boot.read_text() if boot.exists() else ""
    return hashlib.sha256(f"{text}{platform.node()}".encode()).hexdigest()[:12]


def lock(descriptor: int, kind: int) -> bool | None:
    """Try to lock a file; None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, kind)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@dataclass(frozen=True)
class Owner:
    """What the file of a process says of it; `making` is the request that it works on."""

    pid: int
    host: str
    machine: str
    purpose: str
    making: Mapping[str, Any]

    @classmethod
    def read(cls, text: bytes) -> Owner | None:
        """The owner, None where the file was not written to its end."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError):
            return None


class ProcessFile:
    """This process's file in a folder of claims: locked, touched every few seconds, linked to.

    Args:
        folder: of the claims; made where missing.
        purpose: `write` for the whole store, `join` for shards.
        making: what the process makes, for others to compare.

    Attributes:
        token: names this process among all.
        path: of the file.
    """

    def __init__(self, folder: Path, purpose: str, making: Mapping[str, Any]) -> None:
        self._machine = machine()
        self.token = f"{self._machine}-{os.getpid()}-{secrets.token_hex(4)}"
        owner = Owner(os.getpid(), platform.node(), self._machine, purpose, dict(making))
        self._content = json.dumps(vars(owner)).encode()
        self.path = folder / f"process-{self.token}"
        self._copies: dict[str, int] = {}  # file -> descriptor, where links cannot be made
        self._left = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="claims", daemon=True)
        try:
            self._file = self._register()
            self._heart.start()
        except BaseException:  # Ctrl-C at the very beginning
            with suppress(OSError):
                self.path.unlink(missing_ok=True)
                folder.rmdir()
            raise

    def _register(self) -> int:
        while True:
            make_directory(self.path.parent)
            try:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            except FileNotFoundError:  # the last one just left and removed the folder
                continue
            lock(descriptor, fcntl.LOCK_EX)
            self._write(descriptor, self.path)
            with suppress(FileNotFoundError):  # cleared away before it was locked
                if os.path.samestat(os.fstat(descriptor), self.path.stat()):
                    return descriptor
            os.close(descriptor)

    def _beat(self) -> None:
        while not self._left.wait(BEAT):
            for descriptor in (self._file, *tuple(self._copies.values())):
                with suppress(OSError):
                    os.utime(descriptor)

    def link(self, path: Path) -> bool:
        """Make a claim; False where another process has one of this name.

        Raises:
            StoreError: this process's file was deleted.
        """
        try:
            os.link(self.path, path)
        except FileExistsError:
            return self.is_own(path)  # a server may say so of a request that it got twice
        except FileNotFoundError:
            raise StoreError(
                f"{self.path}: this file was deleted while the process was at work; expected "
                "nobody to touch the folder of claims; run again"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return self._copy(path)
        return True

    def _copy(self, path: Path) -> bool:
        """Where there are no hard links: a file of its own, locked and touched likewise."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        self._copies[path.name] = descriptor
        lock(descriptor, fcntl.LOCK_EX)
        self._write(descriptor, path)
        return True

    def _write(self, descriptor: int, path: Path) -> None:
        """Say whose file it is.

        Raises:
            OSError: naming `path`, which the system's error does not.
        """
        try:
            os.write(descriptor, self._content)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error

    def unlink(self, path: Path) -> None:
        """Give a claim up."""
        path.unlink(missing_ok=True)
        if (descriptor := self._copies.pop(path.name, None)) is not None:
            os.close(descriptor)

    def is_own(self, path: Path) -> bool:
        """Whether a file is a claim of this process."""
        mine = self._copies.get(path.name, self._file)
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(mine), path.stat())
        return False

    def living(self, path: Path) -> Owner | None:
        """Who holds a file, when it is another process that is alive."""
        with _opened(path) as descriptor:
            if descriptor is None or self.is_own(path):
                return None
            owner = Owner.read(os.pread(descriptor, 1 << 20, 0))
            unknown = Owner(0, "?", self._machine_of(path), "join", {})
            alive = self._seems_alive(descriptor, owner or unknown, fcntl.LOCK_SH)
            return (owner or unknown) if alive else None

    def _seems_alive(self, descriptor: int, owner: Owner, kind: int) -> bool:
        if owner.machine == self._machine:
            locked = lock(descriptor, kind | fcntl.LOCK_NB)
            if locked is not None:
                return not locked
        os.utime(self._file)  # the file server's clock, not this machine's
        return os.fstat(self._file).st_mtime - os.fstat(descriptor).st_mtime < AGE

    def discard(self, path: Path) -> None:
        """Remove a file that nobody alive holds, under its lock: its owner may be about to."""
        with _opened(path) as descriptor:
            if descriptor is None:
                return
            owner = Owner.read(os.pread(descriptor, 1 << 20, 0))
            if owner is None and not path.name.startswith("process-"):
                path.unlink(missing_ok=True)  # a note, not a claim
                return
            known = owner or Owner(0, "?", self._machine_of(path), "", {})
            if not self._seems_alive(descriptor, known, fcntl.LOCK_EX):
                path.unlink(missing_ok=True)

    def _machine_of(self, path: Path) -> str:
        parts = path.name.split("-")
        return parts[1] if parts[0] == "process" and len(parts) == 4 else ""

    def stop(self) -> None:
        """Touch the files no more."""
        self._left.set()
        self._heart.join()

    def remove(self) -> None:
        """Unlink the file while it is locked: nobody can think that one of this name is theirs."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Give up the locks; the end."""
        for descriptor in (self._file, *self._copies.values()):
            os.close(descriptor)


@contextmanager
def _opened(path: Path) -> Iterator[int | None]:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)
