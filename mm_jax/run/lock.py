"""Keeps a second process out of a run folder that one is training in."""

from __future__ import annotations

import fcntl
import logging
import os
import pathlib
import socket

from mm_jax.config.errors import ConfigError
from mm_jax.run.folder import LOCK_FILE, timestamp

log = logging.getLogger(__name__)


class RunLock:
    """Holds a run folder by a lock on a file in it, which names the holder.

    The system gives the lock back when its holder ends, however it ends: a file that a killed
    process left behind holds nobody up.
    """

    def __init__(self, workdir: pathlib.Path):
        self.path = workdir / LOCK_FILE
        self._file = None

    def acquire(self) -> None:
        """Takes the folder, which is made if need be. Raises ConfigError where another has it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self._locked()
        while file is not None and not _is_file(file, self.path):
            file.close()  # its holder removed it while it was being opened
            file = self._locked()
        if file is None:
            return
        file.seek(0)
        before = file.read()
        if before:
            log.info("%s: taking over from %s, which has ended", self.path, before)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {timestamp()}")
        file.flush()
        self._file = file

    def _locked(self):
        """Opens and locks the file; None where the file system has no locks."""
        file = open(self.path, "a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            with file:
                raise ConfigError(
                    f"--workdir: {self.path.parent} is in use by {file.read() or 'a process'}; "
                    "wait until it has ended, or end it"
                ) from None
        except OSError as error:  # some network file systems are mounted without locks
            log.warning("%s cannot be locked (%s): start no second process there", self.path, error)
            file.close()
            return None
        return file

    def release(self) -> None:
        """Gives the folder back, if this process has it."""
        if self._file is not None:
            self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None


def _is_file(file, path: pathlib.Path) -> bool:
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
