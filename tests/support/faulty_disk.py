"""Disks that fail: at a chosen call, or when the power goes."""

import errno
import os
import shutil
import sqlite3

from esper.registry.disk import Disk


class Crash(BaseException):
    """The process ended here. Nothing that it does afterwards has an effect."""


class FaultyDisk:
    """Counts calls once armed, and fails the chosen one.

    Ways to fail: "before" and "after" raise with the call undone or done; "torn" does half of a
    write and raises; "crash" and "torn crash" raise Crash, then and at every later call.
    """

    def __init__(self, disk=None, after_call=None):
        self._disk = disk or Disk()
        self._after_call = after_call or (lambda: None)
        self._fail_at = self._way = None
        self._is_dead = self._is_buried = False
        self._open = {}
        self.num_calls = 0
        self.failed_call = None

    def arm(self, fail_at=None, way="before"):
        self._fail_at, self._way, self.num_calls = fail_at, way, 0

    def disarm(self):
        self.arm()

    def die(self):
        """Give back what the machine would take back from a process that ended."""
        for close in list(self._open.values()):
            close()
        self._open.clear()
        self._is_buried = True

    def __getattr__(self, name):
        real = getattr(self._disk, name)

        def call(*args):
            if self._is_buried and name == "close":
                return None  # a finalizer, of an object that the machine has cleared up after
            if self._is_dead:
                raise Crash
            self.num_calls += 1
            if self.num_calls - 1 != self._fail_at:
                done = self._remember(name, args, real(*args))
                self._after_call()
                return done
            self.failed_call = name
            return self._fail(name, real, args)

        return call

    def _fail(self, name, real, args):
        if name == "write" and self._way.startswith("torn"):
            descriptor, data = args
            real(descriptor, data[: len(data) // 2])
        elif self._way == "after" or name == "close":  # a close that fails has closed all the same
            self._remember(name, args, real(*args))
        if self._way.endswith("crash"):
            self._is_dead = True
            raise Crash
        if name in ("connect", "execute"):
            raise sqlite3.OperationalError("disk I/O error")
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def _remember(self, name, args, result):
        if name == "create":
            self._open[result] = lambda: os.close(result)
        elif name == "lock":
            self._open[result[0]] = lambda: os.close(result[0])
        elif name == "close":
            self._open.pop(args[0], None)
        elif name == "connect":
            self._open[id(result)] = result.close
        return result


class ForgetfulDisk(Disk):
    """A disk that knows what would be left if the power went now.

    A file's bytes are safe once it was synced, and a name once its directory was. SQLite is
    trusted with its own file: it is left as it stands.
    """

    def __init__(self, root):
        self._root = root
        self._safe_bytes = {}
        self._written = {}
        self._safe_names = {}
        self._inode_of = {}

    def note(self, path):
        """Take a file that is there already for one that is safe."""
        inode = path.stat().st_ino
        self._safe_bytes[inode] = self._written[inode] = path.read_bytes()
        self._safe_names.setdefault(path.parent, {})[path.name] = inode

    def create(self, path):
        descriptor = super().create(path)
        inode = self._inode_of[descriptor] = os.fstat(descriptor).st_ino
        self._safe_bytes[inode] = self._written[inode] = b""
        return descriptor

    def write(self, descriptor, data):
        taken = super().write(descriptor, data)
        self._written[self._inode_of[descriptor]] += bytes(data[:taken])
        return taken

    def sync(self, descriptor):
        super().sync(descriptor)
        inode = self._inode_of[descriptor]
        self._safe_bytes[inode] = self._written[inode]

    def sync_directory(self, path):
        super().sync_directory(path)
        self._safe_names[path] = self._names_now(path)

    def leave(self, target, *, names_kept):
        """Write what would be left into the directory ``target``.

        ``names_kept`` says whether names that were not synced happen to be safe as well: file
        systems differ, and a store must bear both.
        """
        shutil.rmtree(target, ignore_errors=True)
        for name in ("blobs", "quarantine"):
            folder = self._root / name
            (target / name).mkdir(parents=True)
            for file, data in self.left_in(folder, names_kept=names_kept).items():
                (target / name / file).write_bytes(data)
        for name in ("index.sqlite", "index.sqlite-wal"):
            if (self._root / name).exists():
                shutil.copyfile(self._root / name, target / name)

    def left_in(self, folder, *, names_kept):
        """Return what would be left in a folder, by name."""
        names = self._names_now(folder) if names_kept else self._safe_names.get(folder, {})
        return {file: self._safe_bytes[inode] for file, inode in names.items()}

    def _names_now(self, folder):
        return {entry.name: entry.inode() for entry in os.scandir(folder) if entry.is_file()}
