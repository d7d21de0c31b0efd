"""One target under atheris, in a process of its own: `python -m tools.fuzz.guided TARGET SECONDS WORKDIR`.

libFuzzer ends the process itself. Our Python is instrumented as it is imported; C (msgpack, NumPy, json) is not.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["vmmigrate"]):
    from tools.fuzz.targets import TARGETS, corpus_of


def main(name: str, seconds: str, directory: str) -> None:
    target = TARGETS[name]
    seeds = Path(directory) / "seeds"
    seeds.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate([*target.seeds, *(path.read_bytes() for path in corpus_of(target))]):
        (seeds / f"seed-{number}").write_bytes(seed)
    options = {
        "max_total_time": seconds,
        "max_len": target.max_bytes,
        "timeout": 10,
        "rss_limit_mb": 1024,
        "print_final_stats": 1,
        "artifact_prefix": f"{directory}/",
    }
    atheris.Setup([sys.argv[0], *(f"-{option}={value}" for option, value in options.items()), str(seeds)], target.read)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
