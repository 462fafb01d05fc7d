"""Limits the process that it runs in, and becomes the program: python -I sandbox_child.py LIMITS PROGRAM.

LIMITS is JSON: seconds, memory, file_size (bytes), processes, folder. It ends with code 125 where a limit cannot be
set. It is run by its path in a Python of its own and imports nothing of alignzoo.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
from pathlib import Path

# Linux's Landlock (since 5.13): the numbers of the system calls are the same on all architectures.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
PR_SET_NO_NEW_PRIVS = 38
WRITE = 0b1_1111_1111_0010  # of the first version's rights: all but execute, read a file, read a folder
RIGHTS = {1: WRITE, 2: WRITE | 1 << 13, 3: WRITE | 1 << 13 | 1 << 14}  # 2: links across folders; 3: truncating


class PathRule(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32))


def limit(seconds: int, memory: int, file_size: int, processes: int) -> None:
    for kind, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, file_size),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def write_only_below(folder: str) -> bool:
    """Takes the right to change files anywhere else. False where the system has no Landlock."""
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    rights = RIGHTS[min(version, 3)]
    handled = ctypes.c_uint64(rights)
    ruleset = libc.syscall(CREATE_RULESET, ctypes.byref(handled), ctypes.c_size_t(8), 0)
    for path in (folder, "/dev/null"):
        opened = os.open(path, os.O_PATH)
        of_files = 1 << 1 | (1 << 14 if version >= 3 else 0)  # what may be allowed on something that is no folder
        rule = PathRule(rights if path == folder else of_files, opened)
        if libc.syscall(ADD_RULE, ruleset, 1, ctypes.byref(rule), 0):
            return False
        os.close(opened)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    return bool(libc.syscall(RESTRICT_SELF, ruleset, 0) == 0)


def main(text: str, program: str) -> None:
    limits = json.loads(text)
    folder = limits.pop("folder")
    try:
        limit(**limits)
        shut = write_only_below(folder)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(125)
    os.environ["SANDBOX_FILES"] = "yes" if shut else "no"
    os.execv(sys.executable, [sys.executable, "-I", str(Path(folder) / program)])


if __name__ == "__main__":
    main(*sys.argv[1:])
