"""Child processes that end with the process that has started them, even if that is killed.

Linux does it, when asked; elsewhere nothing happens. Not here: what the children are.
"""

import os
from collections.abc import Sequence

# What the child does before it becomes the command. Its parent may have ended before Linux was asked.
BEGIN = """\
import ctypes, os, signal, sys
parent, streams, *command = sys.argv[1:]
if sys.platform == "linux":
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
if os.getppid() == int(parent):
    if streams == "joined":
        os.dup2(1, 2)
    os.execvp(command[0], command)
"""


def ends_with_parent(command: Sequence[str], join_streams: bool = False) -> list[str]:
    """Arguments for this interpreter that become `command`, which gets SIGTERM when the calling process has ended.

    join_streams: what it writes to stderr goes where its stdout goes.
    """
    return ["-ISc", BEGIN, str(os.getpid()), "joined" if join_streams else "apart", *command]
