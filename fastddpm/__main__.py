"""`fastddpm` and `python -m fastddpm`: the entry point, in front of anything that imports torch."""

import os
import signal
import sys


def main() -> int:
    """Run the command line; returns the exit code."""
    # OpenMP threads that wait spin for long by default. On a machine that does something else besides, each of the
    # hundreds of small parallel regions of a step then waits for a core that a spinning thread holds: a step of the
    # digits preset took 1683 ms beside one busy process on 2 cores, 218 ms with this, and 56 ms alone either way.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    try:
        # Ctrl-C among the imports ends the process at once: raised there, it can surface as any other error or be lost.
        handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
        from .cli import main as command

        signal.signal(signal.SIGINT, handler)
        code = command()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("fastddpm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `fastddpm ... | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
