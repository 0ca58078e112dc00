#!/usr/bin/env python3
"""Line coverage of every crate from the JSON of cargo llvm-cov. Exit status 1: 90 % or less in any. Called by coverage.sh."""
import json
import pathlib
import sys

GOAL = 90.0
ROOT = pathlib.Path(__file__).resolve().parent.parent
WORST = 15


def crate_of(path):
    first = path.relative_to(ROOT).parts[0]
    return {"src": "doorbell"}.get(first, f"doorbell-{first}")


def main():
    crates, files = {}, []
    for entry in json.loads(pathlib.Path(sys.argv[1]).read_text())["data"][0]["files"]:
        path, lines = pathlib.Path(entry["filename"]), entry["summary"]["lines"]
        if not path.is_relative_to(ROOT) or not lines["count"]:
            continue
        covered, count = crates.get(crate_of(path), (0, 0))
        crates[crate_of(path)] = (covered + lines["covered"], count + lines["count"])
        files.append((lines["percent"], lines["count"] - lines["covered"], path.relative_to(ROOT)))
    print(f"the {WORST} files with the most lines that no test runs:")
    for percent, missing, path in sorted(files, key=lambda file: -file[1])[:WORST]:
        print(f"  {percent:5.1f} %  {missing:4} lines  {path}")
    short = False
    for crate, (covered, count) in sorted(crates.items()):
        percent = 100 * covered / count
        short |= percent <= GOAL
        print(f"{crate}: {percent:.1f} % of {count} lines, goal > {GOAL:.0f} %, {'met' if percent > GOAL else 'short'}")
    sys.exit(1 if short or not crates else 0)


if __name__ == "__main__":
    main()
