"""`python -m halfbyte`."""

from halfbyte.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
