"""The lock that keeps two drivers out of one run directory.

Takes a path; holds an advisory lock on it for as long as the process lives, however it dies. It knows nothing of runs.
"""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

from rlhf_cluster.storage.durable import StorageError


class RunLock:
    """Held from construction to `release`, or to the end of the process. Raises StorageError naming the holder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        except BlockingIOError as error:
            holder = os.pread(self._descriptor, 400, 0).decode(errors="replace") or "another process"
            self.release()
            raise StorageError(
                f"{path.parent} is in use by {holder}; wait for it, stop it, or choose another run directory"
            ) from error
        except OSError as error:
            self.release()
            raise StorageError(f"{path} cannot be locked ({error.strerror}); choose another run directory") from error

    def release(self) -> None:
        """Lets go; may be repeated. The file stays: removing it would let two processes lock two files of one name."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def is_held(path: Path) -> bool:
    """Whether a process holds the lock on `path`."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False
