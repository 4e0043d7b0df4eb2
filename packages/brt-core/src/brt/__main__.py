"""``python -m brt`` is the ``brt`` command."""

from brt.cli import main

if __name__ == "__main__":
    main()
