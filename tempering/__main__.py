"""Run the ``tempering`` command; it is ``python -m tempering`` too."""

import sys


def main() -> int:
    """Run the command and return its exit code, 130 if Ctrl-C comes while it is imported."""
    try:
        from tempering.cli.main import main
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return main()


if __name__ == "__main__":
    sys.exit(main())
