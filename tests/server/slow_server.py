"""A server whose engine takes its time, with small limits: `python slow_server.py MODEL {options as JSON}`.

options: step_seconds, limits (fields of Limits), engine (fields of EngineConfig), keys, heartbeat (seconds
after which a silent engine is not ready).
The worker is this file too: `python slow_server.py --worker STEP_SECONDS FD`.
"""

import json
import sys
import time
from pathlib import Path


def serve_slowly(path: str, options: dict) -> None:
    from lowbit.server import supervisor
    from lowbit.server.limits import Limits
    from lowbit.server.serve import Options, report_to_stderr, serve

    supervisor.HEARTBEAT_LIMIT_SECONDS = options.get("heartbeat", supervisor.HEARTBEAT_LIMIT_SECONDS)

    worker = [sys.executable, __file__, "--worker", str(options.get("step_seconds", 0.02))]
    serve(
        Options(
            models=[("tiny", Path(path))],
            port=0,
            load={"threads": 1},
            engine={"kv_blocks": 64, **options.get("engine", {})},
            keys=options.get("keys", []),
            limits=Limits(**options.get("limits", {})),
            worker=worker,
        ),
        report_to_stderr,
    )


def work_slowly(seconds: float, descriptor: int) -> int:
    from lowbit.engine.core import EngineCore
    from lowbit.server import worker

    quick = EngineCore.step

    def step(self):
        time.sleep(seconds)
        return quick(self)

    EngineCore.step = step
    return worker.main(descriptor)


if __name__ == "__main__":
    if sys.argv[1] == "--worker":
        sys.exit(work_slowly(float(sys.argv[2]), int(sys.argv[3])))
    serve_slowly(sys.argv[1], json.loads(sys.argv[2]))
