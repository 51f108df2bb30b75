"""``python -m tests.peft_suite``: the whole suite, or parts of it, with a table at the end."""

from __future__ import annotations

import argparse
import sys

from .cases import CASES
from .runner import Result, run_file
from .upstream import TEST_FILES, UpstreamUnavailableError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.peft_suite", description=__doc__)
    parser.add_argument("--files", default=",".join(TEST_FILES), help=f"comma separated, of {','.join(TEST_FILES)}")
    parser.add_argument("-n", dest="workers", type=int, default=0, help="processes (needs pytest-xdist)")
    parser.add_argument(
        "--method",
        action="append",
        choices=[case.name for case in CASES if not case.baseline],
        help="only this method; may be given several times",
    )
    parser.add_argument(
        "--baseline",
        choices=[case.name for case in CASES if case.baseline],
        help="run a method built into PEFT in place of ours, to see what upstream's tests do by themselves",
    )
    parser.add_argument("-k", dest="expression", help="only tests that match, as in pytest")
    parser.add_argument("--show-skips", action="store_true", help="list what was skipped, with the reason")
    options = parser.parse_args(arguments)
    files = options.files.split(",")
    unknown = [file for file in files if file not in TEST_FILES]
    if unknown:
        parser.error(f"--files: {unknown} unknown, choose from {list(TEST_FILES)}")
    if options.baseline and options.method:
        parser.error("--baseline and --method exclude each other")
    methods = [options.baseline] if options.baseline else options.method

    try:
        results = [
            run_file(file, methods=methods, workers=options.workers, expression=options.expression, echo=True)
            for file in files
        ]
    except UpstreamUnavailableError as error:
        print(error, file=sys.stderr)
        return 2
    print_table(results)
    if options.show_skips:
        for result in results:
            for node, reason in result.skips:
                print(f"skipped {node}: {reason}")
    return 0 if all(result.good for result in results) else 1


def print_table(results: list[Result]) -> None:
    print(f"\n{'file':<10}{'passed':>8}{'skipped':>9}{'failed':>8}{'xfailed':>9}{'seconds':>9}  verdict")
    for result in results:
        print(
            f"{result.file:<10}{result.passed:>8}{result.skipped:>9}{len(result.failures):>8}{result.xfailed:>9}"
            f"{result.seconds:>9.0f}  {'good' if result.good else f'BAD (pytest exit code {result.returncode})'}"
        )


if __name__ == "__main__":
    sys.exit(main())
