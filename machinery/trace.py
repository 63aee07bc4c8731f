"""Trace: what processor and GPU did during some steps, to be looked at in a browser.

    batches --> [first steps, one to warm up] --> N steps, recorded --> trace.json
                                                                            |
                                            https://ui.perfetto.dev  <------+

Idea     Seconds tell how long a step takes, a trace tells why: each operation is a bar on a
         line of time, the host's above and the GPU's below. Gaps in the lower one are where the
         GPU waits for the host.
Paper    none
Try      python train.py --data shapes:64 --epochs 2 --warmup_epochs 0 --profile 2
Change   what is recorded beside times (shapes, memory): what `traced` asks of the profiler
Tests    pytest tests/machinery/test_trace.py
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from machinery.clock import FIRST_STEPS
from machinery.process import Process


def traced(batches: Iterable, steps: int, folder: Path, process: Process) -> Iterator:
    """The same batches; what is done with `steps` of them is recorded into folder/trace.json.

    The first ones are left out, because memory and compiled code are made in them. Only the
    main process records: the others do the same at the same time. What the loop does between two
    steps, such as k-NN at the end of an epoch or a checkpoint, counts to the step before.
    """
    if not process.main:
        yield from batches
        return

    file = folder / "trace.json"
    file.unlink(missing_ok=True)

    # Called by the profiler when the steps are recorded. The format is that of Chrome's tracing,
    # which the page of Perfetto draws without sending the file anywhere.
    def write(profiler):
        profiler.export_chrome_trace(str(file))
        process.print(f"wrote {file}: drop it on https://ui.perfetto.dev to see these steps")

    # "wait" steps are not recorded; "warmup" is recorded and thrown away, because to record
    # costs time itself at first.
    when = torch.profiler.schedule(wait=FIRST_STEPS, warmup=1, active=steps, repeat=1)
    activities = [ProfilerActivity.CPU]
    if process.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    try:
        with torch.profiler.profile(activities=activities, schedule=when,
                                    on_trace_ready=write) as profiler:
            for batch in batches:
                yield batch
                # Back here the step is over, and what came after it: the loop asks for the next
                # batch.
                profiler.step()
    finally:
        if not file.exists():
            process.print(f"--profile wrote nothing: the first {FIRST_STEPS + 1} steps are not "
                          "recorded, and the run took no more")
