"""`python -m starlm` is `starlm`."""

from starlm.cli.main import entry

if __name__ == "__main__":
    entry()
