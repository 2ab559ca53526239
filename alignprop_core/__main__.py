"""`python -m alignprop_core` is the command `alignprop`."""

from alignprop_core.cli import main

if __name__ == "__main__":
    main()
