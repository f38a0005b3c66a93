"""Run the `crma` command as `python -m crma`."""

from crma.cli.command import main

if __name__ == "__main__":
    main()
