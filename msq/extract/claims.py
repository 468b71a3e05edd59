"""Who writes a store: claims beside it, in `NAME.zarr.claims/`, that outlive no one.

Each process that writes has one file in that folder. It holds an advisory lock (`flock`) on it and
touches it every few seconds. All its claims (of the whole store, of a shard) are hard links to that
file: the link is made or not made in one step, and all of them live and die with the process.

- On one machine the kernel frees the lock of a process that died, so its claims are free at once.
- Between machines `flock` may not reach; a claim counts as dead when its file was not touched for
  `AGE` seconds by the clock of the file server.

Who takes over a dead claim links the next generation of it (`shard-00000007.1` after `.0`): only
one can. Who finds a later generation than its own has lost the claim. Should two ever make the
same shard (a machine that slept, say), both write the same bytes, whole files by rename: no harm
is done.
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
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from msq.errors import StoreError
from msq.extract.atomic import make_directory
from msq.extract.location import is_local

BEAT = 10.0  # seconds between two touches
AGE = 90.0  # seconds without a touch after which a claim of another machine is dead
WRITER = "writer"
MEMBER = "member"
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


def claims_folder(store: Path) -> Path:
    """Where the claims of a store are; a link to the store is the same store."""
    store = store.resolve()
    return store.with_name(store.name + ".claims")


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


class Holder:
    """This process in a claims folder.

    Args:
        folder: of the claims; made where missing, and gone when the last process leaves.
        purpose: `write` for the whole store, `join` for shards.
        making: what the process makes, for others to compare.
    """

    def __init__(self, folder: Path, purpose: str, making: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self.machine = machine()
        self.token = f"{self.machine}-{os.getpid()}-{secrets.token_hex(4)}"
        host = platform.node()
        owner = Owner(os.getpid(), host, self.machine, purpose, dict(making or {}))
        self._content = json.dumps(vars(owner)).encode()
        self._name = f"process-{self.token}"
        self._claims: dict[str, int] = {}  # name -> generation
        self._copies: dict[str, int] = {}  # file -> descriptor, where links cannot be made
        self._left = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="claims", daemon=True)
        try:
            self._file = self._register()
            self._heart.start()
        except BaseException:  # Ctrl-C at the very beginning
            with suppress(OSError):
                (folder / self._name).unlink(missing_ok=True)
                folder.rmdir()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def _register(self) -> int:
        path = self.folder / self._name
        while True:
            make_directory(self.folder)
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            except FileNotFoundError:  # the last one just left and removed the folder
                continue
            lock(descriptor, fcntl.LOCK_EX)
            os.write(descriptor, self._content)
            with suppress(FileNotFoundError):  # cleared away before it was locked
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
            os.close(descriptor)

    def _beat(self) -> None:
        while not self._left.wait(BEAT):
            for descriptor in (self._file, *tuple(self._copies.values())):
                with suppress(OSError):
                    os.utime(descriptor)

    def claim(self, name: str) -> bool:
        """Take the only right to something; False where a process that is alive has it."""
        found = self._generations(name)
        if any(self._is_alive(path) for path in found.values()):
            return False
        generation = max(found, default=-1) + 1
        path = self.folder / f"{name}.{generation}"
        if not self._link(path):
            return False
        # Whoever looked before the last owner left may have linked another generation.
        others = self._generations(name)
        if any(self._is_alive(other) for number, other in others.items() if number != generation):
            self._unlink(path)
            return False
        self._claims[name] = generation
        return True

    def keeps(self, name: str) -> bool:
        """Whether a claim is still this process's: nobody believed it dead and took it over."""
        generation = self._claims.get(name)
        found = self._generations(name)
        return generation in found and max(found) == generation and self._is_own(found[generation])

    def release(self, name: str) -> None:
        """Give a claim up, and what dead processes left of it."""
        generation = self._claims.pop(name, -1)
        for number, path in self._generations(name).items():
            if number <= generation:
                self._unlink(path)

    def owner(self, name: str) -> Owner | None:
        """The living process, other than this one, that has a claim."""
        owners = [self._living(path) for path in self._generations(name).values()]
        return next((owner for owner in owners if owner is not None), None)

    def others(self, prefix: str) -> list[Owner]:
        """Living processes, other than this one, with a claim whose name starts so."""
        owners = [self._living(path) for path in self._entries() if path.name.startswith(prefix)]
        return [owner for owner in owners if owner is not None]

    def clear(self) -> None:
        """Remove what dead processes left; whoever calls it knows that nobody is at work."""
        for path in self._entries():
            if not self._is_own(path):
                self._discard(path)

    def leave(self) -> None:
        """Give everything up; the last one takes the folder along."""
        self._left.set()
        self._heart.join()
        for name in list(self._claims):
            self.release(name)
        # Unlinked while still locked: nobody can think that a file of this name is theirs.
        (self.folder / self._name).unlink(missing_ok=True)
        entries = self._entries()
        processes = [path for path in entries if path.name.startswith("process-")]
        for path in processes:
            self._discard(path)
        if not any(path.exists() for path in processes):
            for path in set(entries).difference(processes):
                path.unlink(missing_ok=True)
            with suppress(OSError):
                self.folder.rmdir()
        for descriptor in (self._file, *self._copies.values()):
            os.close(descriptor)

    def _link(self, path: Path) -> bool:
        own = self.folder / self._name
        try:
            os.link(own, path)
        except FileExistsError:
            return self._is_own(path)  # a server may say so of a request that it got twice
        except FileNotFoundError:
            raise StoreError(
                f"{own}: this file was deleted while the process was at work; expected nobody to "
                "touch the folder of claims; run again"
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
        lock(descriptor, fcntl.LOCK_EX)
        os.write(descriptor, self._content)
        self._copies[path.name] = descriptor
        return True

    def _unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        if (descriptor := self._copies.pop(path.name, None)) is not None:
            os.close(descriptor)

    def _entries(self) -> list[Path]:
        try:
            return sorted(self.folder.iterdir())
        except FileNotFoundError:
            return []

    def _generations(self, name: str) -> dict[int, Path]:
        found = [path for path in self._entries() if path.name.startswith(f"{name}.")]
        return {int(path.suffix[1:]): path for path in found if path.suffix[1:].isdecimal()}

    def _is_own(self, path: Path) -> bool:
        mine = self._copies.get(path.name, self._file)
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(mine), path.stat())
        return False

    def _is_alive(self, path: Path) -> bool:
        return self._is_own(path) or self._living(path) is not None

    def _living(self, path: Path) -> Owner | None:
        """Who holds a file, when it is another process that is alive."""
        with _opened(path) as descriptor:
            if descriptor is None or self._is_own(path):
                return None
            owner = Owner.read(os.pread(descriptor, 1 << 20, 0))
            unknown = Owner(0, "?", self._machine_of(path), "join", {})
            alive = self._seems_alive(descriptor, owner or unknown, fcntl.LOCK_SH)
            return (owner or unknown) if alive else None

    def _seems_alive(self, descriptor: int, owner: Owner, kind: int) -> bool:
        if owner.machine == self.machine:
            locked = lock(descriptor, kind | fcntl.LOCK_NB)
            if locked is not None:
                return not locked
        os.utime(self._file)  # the file server's clock, not this machine's
        return os.fstat(self._file).st_mtime - os.fstat(descriptor).st_mtime < AGE

    def _discard(self, path: Path) -> None:
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


@contextmanager
def claim_store(store: Path) -> Iterator[None]:
    """Hold the only right to write `store`; the claim's folder is gone afterwards.

    A store behind a URL has no claims: there must be one writer.

    Raises:
        StoreError: another process that is alive writes the store; the message names it.
    """
    if not is_local(store):
        yield
        return
    with Holder(claims_folder(store), "write") as holder:
        while not holder.claim(WRITER):
            if (owner := holder.owner(WRITER)) is not None:
                raise StoreError(held(store, owner))
            time.sleep(0.01)
        if members := holder.others(MEMBER):
            raise StoreError(held(store, members[0]))
        yield


def held(store: Path, owner: Owner) -> str:
    """Who holds a store, and what to do about it."""
    age = f"; if that machine is gone, the store is free after {AGE:.0f} seconds"
    elsewhere = age if owner.machine != machine() else ""
    return (
        f"{store}: process {owner.pid} is writing this store (on {owner.host}); wait for it to "
        f"end, or choose another store{elsewhere}"
    )
