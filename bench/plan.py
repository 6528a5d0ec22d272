"""`make bench-plan`: predictions against measurement on this machine, on networks and shapes that took no
part in the
fit; writes bench/results/plan.json and the measured part of docs/planning.md. `--render` does only the last
step.

What is measured
    operators   single steps of networks in which one operation decides: products by format and tokens,
        attention
                by context and bits, the head; shapes that the profile does not have
    token       time per token: SmolLM2-135M's and the random 1.1B shape, several formats, users and contexts
    first       time to the first token of the same
    memory      peak resident bytes of `lowbit run` in a process of its own
    regret      for several budgets: the plan that was chosen, measured, against the best of all measured
        plans
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))  # measure this tree, installed or not

import machine  # noqa: E402
import plan_cases  # noqa: E402
import plan_page  # noqa: E402

RESULT = ROOT / "bench" / "results" / "plan.json"
PAGE = ROOT / "docs" / "planning.md"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/plan.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--render", action="store_true", help="only docs/planning.md, from the last result")
    parser.add_argument("--quick", action="store_true", help="a few cases of each part; writes nothing")
    parser.add_argument("--profile", type=Path, help="of an earlier doctor --profile, instead of a new one")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache", help="default %(default)s")
    return parser.parse_args(arguments)


def say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if not options.render:
        result = measure(options)
        print(plan_page.summary(result))
        if options.quick:
            return 0
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    PAGE.write_text(plan_page.insert(PAGE.read_text(encoding="utf-8"), result), encoding="utf-8")
    return 0 if plan_page.passed(result) else 1


def measure(options: argparse.Namespace) -> dict[str, Any]:
    from lowbit.plan.machine import MeasuredMachine

    busy = machine.busy_cpus()
    profile = plan_cases.profile(options.profile, say)
    made = MeasuredMachine(profile)
    result: dict[str, Any] = {
        "date": machine.now(),
        **machine.commit(),
        "machine": machine.describe(),
        "busy_cpus_before": busy,
        "profile_seconds": profile.seconds_taken,
        "quick": options.quick,
    }
    for part, cases in plan_cases.PARTS.items():
        begun = time.perf_counter()
        result[part] = cases(made, options.quick, options.cache, say)
        say(f"{part}: {len(result[part])} figures in {time.perf_counter() - begun:.0f} s")
    result["busy_cpus_after"] = machine.busy_cpus()
    result["verdicts"] = plan_page.verdicts(result)
    return result


if __name__ == "__main__":
    sys.exit(main())
