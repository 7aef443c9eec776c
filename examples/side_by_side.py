"""One prompt, every variant of an artifact, one batch: python examples/side_by_side.py ARTIFACT"""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

import moecc


def main(artifact: str, prompt: str = "def f(x):") -> None:
    table = Table("variant", "goes on", title=f"{prompt!r} in one batch of all variants")
    with moecc.load(artifact) as served:
        prompts = [prompt] * len(served.variants)
        for done in served.generate(served.variants, prompts, max_tokens=24, temperature=0):
            table.add_row(done.variant, repr(done.text))
    Console().print(table)


if __name__ == "__main__":
    main(*sys.argv[1:])
