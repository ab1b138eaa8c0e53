"""The door: most runs find nothing to do, and those need not know the rest of the program."""

import os
import sys

from scx_enroll import idle


def main() -> int:
    """Run the command line; returns the exit status (docs/exit-status.md)."""
    try:
        idle.open_standard_files()
        asked = sys.argv[1:]
        if asked[:1] == ["idle"]:
            options = [word for word in asked[1:] if word != "--else-start"]
            if idle.answer(["run", "--unattended", *options], silent=True) == 0:
                return 0
        else:
            status = idle.answer(asked)
            if status is not None:
                return status
        if sys.flags.no_site:  # the packages' command: an idle run needs none of the distribution's libraries
            import site

            site.main()
        from scx_enroll import cli
    except KeyboardInterrupt:  # before there is anything to finish or to undo
        import signal

        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
