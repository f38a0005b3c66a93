"""The benchmark's command line."""

import argparse
from collections.abc import Collection, Sequence
from functools import partial

from bench.workloads import ALL_ROWS

START = "start"
ROW_NAMES = (START, *ALL_ROWS)


def parse_options(
    arguments: Sequence[str] | None, about: str, engines: Collection[str]
) -> argparse.Namespace:
    """Read the command line.

    Args:
        arguments: without the program's name; None: the process's own.
        about: the program's description.
        engines: names of what the benchmark starts itself.

    Returns:
        `rows` and `engines`, frozensets of names; `urls`, pairs of name and address; `quick`,
        `quiet` and `repetitions`. Ends the process for anything else.
    """
    parser = argparse.ArgumentParser(prog="bench", description=about)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few requests, once: shows that the benchmark works; the figures mean nothing",
    )
    parser.add_argument(
        "--rows",
        type=partial(_names, ROW_NAMES),
        default=frozenset(ROW_NAMES),
        metavar="ROW,…",
        help=f"only these rows, of {', '.join(ROW_NAMES)}",
    )
    parser.add_argument(
        "--engines",
        type=partial(_names, engines),
        default=frozenset(engines),
        metavar="ENGINE,…",
        help=f"of {', '.join(engines)} only these, beside those at a --url",
    )
    parser.add_argument(
        "--repetitions", type=int, default=3, help="how often each row is measured (3)"
    )
    parser.add_argument(
        "--url",
        action="append",
        default=[],
        type=_name_and_url,
        metavar="NAME=URL",
        dest="urls",
        help="also measure the server that is running at URL; may be repeated",
    )
    parser.add_argument("--quiet", action="store_true", help="nothing on stderr")
    return parser.parse_args(arguments)


def _names(known: Collection[str], text: str) -> frozenset[str]:
    names = frozenset(filter(None, text.split(",")))
    unknown = sorted(names.difference(known))
    if unknown:
        message = f"there is no {', '.join(unknown)}; there are {', '.join(known)}"
        raise argparse.ArgumentTypeError(message)
    return names


def _name_and_url(text: str) -> tuple[str, str]:
    name, _, url = text.partition("=")
    if not name or not url:
        raise argparse.ArgumentTypeError(f"must be NAME=URL, not {text!r}")
    return name, url
