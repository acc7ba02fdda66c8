"""The entry point of ``lamina`` and ``python -m lamina``: it needs nothing before it can be interrupted."""

import os
import signal
import sys


def main() -> None:
    """Run the command; it finds standard streams that are open, and Ctrl-C ends it without a traceback."""
    # Importing takes a moment, in which Ctrl-C would show where it struck.
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    _open_streams()
    from lamina.cli import main as run

    try:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        run()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _open_streams() -> None:
    """Open the standard streams that the caller has closed; else the next files and sockets would take their place."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 - it lives as long as the process


if __name__ == "__main__":
    main()
