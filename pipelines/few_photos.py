"""Train, generate, score, and write `result.json`, `few-photos.md` and the image grids."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from veneer.benchmarks.few_photos.benchmark import PAGE, few_photos
from veneer.benchmarks.few_photos.config import FewPhotosConfig
from veneer.cli import log_to_stderr
from veneer.flags import add_flags, values
from veneer.injection import VeneerError

from .personalize import personalize


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m veneer.pipelines.few_photos", description=__doc__)
    add_flags(parser, FewPhotosConfig, positional=("data",))
    given = vars(parser.parse_args(arguments))
    log_to_stderr()
    try:
        out = few_photos(FewPhotosConfig(**values(FewPhotosConfig, given)), personalize)
        print((out / PAGE).read_text(encoding="utf-8"))
    except (VeneerError, ValueError, OSError) as error:
        print(f"few_photos: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("few_photos: interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
