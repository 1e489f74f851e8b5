"""Runs the command line: python -m jaxmoe."""

from jaxmoe.cli.main import run

if __name__ == "__main__":
    run()
