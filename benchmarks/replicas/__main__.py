"""Several pickers at once against one: how even the load is, how many prefixes are hit.

In virtual time, with the picker's own view of load and its own choice; figures do not depend on the
machine. `python -m benchmarks.replicas` writes docs/benchmarks/replicas.md.
"""

from pathlib import Path

from tests.gateway_epp.simulated_replicas import PREFIXES_CACHED, Seen, Simulation

PAGE = Path(__file__).parent.parent.parent / "docs" / "benchmarks" / "replicas.md"
SEEDS = range(1, 21)
PICKERS = {
    "one, our workers": {"pickers": 1, "confirms": True},
    "three, our workers": {"pickers": 3, "confirms": True},
    "one, stock engines": {"pickers": 1, "confirms": False},
    "three, stock engines": {"pickers": 3, "confirms": False},
    "five, stock engines": {"pickers": 5, "confirms": False},
    "three that believe all figures": {"pickers": 3, "confirms": False, "believes_all": True},
}
WORKLOADS = {
    "each prompt new": {},
    "96 shared prefixes": {"prefixes": 96, "rate": 120.0},
}


def row(name: str, seen: Seen, one: Seen) -> str:
    hits = f"{seen.hits:.1%}" if one.hits else "–"
    return (
        f"| {name} | {seen.requests:.2f} | {seen.requests / one.requests:.2f}× "
        f"| {seen.blocks:.2f} | {seen.blocks / one.blocks:.2f}× | {hits} |"
    )


def main() -> None:
    of = Simulation(1, True)
    lines = [
        "# Replicas: how evenly several pickers spread the load",
        "",
        f"{of.requests:,} requests over {of.workers} workers in virtual time, mean over "
        f"{len(SEEDS)} seeds. Spread is the fullest worker over the mean, seen at each arrival: of "
        "requests in hand, and of KV blocks (held, and of prompts still to compute). Ratios are to "
        "one picker of our workers. Prompts have 665 tokens on average, up to 8,192, so a few are "
        "most of the blocks. Where prompts share prefixes, those are 960 tokens of about 1,120, "
        f"and each worker caches {PREFIXES_CACHED} of them.",
    ]
    for workload, settings in WORKLOADS.items():
        results = {
            name: Simulation(**pickers, **settings).seen(*SEEDS)  # type: ignore[arg-type]
            for name, pickers in PICKERS.items()
        }
        one = results["one, our workers"]
        lines += [
            "",
            f"## {workload.capitalize()}",
            "",
            "| pickers | requests | against one | blocks | against one | prefix hits |",
            "|---|---|---|---|---|---|",
            *(row(name, seen, one) for name, seen in results.items()),
        ]
    lines += [
        "",
        "Our workers confirm each request to every picker within milliseconds. Stock engines tell "
        "their load four times a second, and what others sent since then nobody sees; that is what "
        "is left in the blocks. The last line is Dynamo's issue #589: each picker makes up for "
        "the whole difference that all of them see. How that is avoided: [routing]"
        "(../routing.md#several-pickers). `python -m benchmarks.replicas` writes this page.",
        "",
    ]
    PAGE.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
