"""`python -m glimmer`, `torchrun -m glimmer` and `glimmer`: the command line. All of it is in cli/main.py.

Imports take a while, and so does the end of the interpreter. cli/main.py answers Ctrl-C in words; before and after it
Ctrl-C ends the process at once and without a word, for which this file takes care before it imports anything of ours.
"""

import sys

INTERRUPTED = 130  # as cli/exits.py has it, which is not there yet

try:
    import os
    import signal

    def end(*_: object) -> None:
        """As a handler of Ctrl-C: the end of the process."""
        os._exit(INTERRUPTED)

    def replace(handler: object, other: "signal._HANDLER") -> None:
        """Another handler of Ctrl-C in place of this one; not where Ctrl-C is ignored (nohup) or somebody else's."""
        if signal.getsignal(signal.SIGINT) is handler:
            signal.signal(signal.SIGINT, other)

    replace(signal.default_int_handler, end)
except KeyboardInterrupt:
    sys.exit(INTERRUPTED)


def main(module: str = "glimmer.cli.main", *args: object, **options: object) -> int:
    """The exit code of main(*args, **options) of cli/main.py or another module. Ctrl-C ends the process here, and so
    does a failure of one of several processes."""
    try:
        import importlib

        command_line = importlib.import_module(module)
        replace(end, signal.default_int_handler)
        code: int = command_line.main(*args, **options)
        replace(signal.default_int_handler, end)
    except KeyboardInterrupt:
        code = INTERRUPTED
    # What is to be said has been said, and an interpreter with torch takes a while to end: half a second in which
    # a launcher's SIGTERM would end a rank that has a code of its own.
    if code == INTERRUPTED or (code != 0 and not importlib.import_module("glimmer.cli.exits").alone()):
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
