"""Clock: how fast the steps are, how long the rest will take, and how far a long task is.

    wait for a batch --> step --> tick        pause: evaluations and saves do not count
         |                 |
       waited     seconds of a step  -->  rate, share of waiting, time left

Idea     The time left is the number of steps left times the time of one step. So evaluations
         and saves must not count as steps, and neither must the first steps, which are slow:
         they start worker processes and compile kernels.
Paper    none
Try      python -m machinery.clock      the rate of ten steps of a twentieth of a second
Change   how many first steps do not count: Clock(skip=)
Tests    pytest tests/machinery/test_clock.py
"""

import contextlib
import sys
import time

import torch

from machinery.process import Process


def hours(seconds: int) -> str:
    """Hours, minutes and seconds: 3,723 gives 1:02:03."""
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


# Each step multiplies the weight of all earlier ones by this. Example: a step of 1,000 steps ago
# has the weight 0.999^1000 = 0.37, one of 5,000 steps ago 0.007.
KEPT = 0.999
FIRST_STEPS = 5  # so many are slow, because memory and compiled code are made: they do not count


class Clock:
    """Rate and time left of a loop of steps.

    Used like this, once per step: batch = clock.wait(batches); the step itself; clock.tick();
    and everything that is not a step inside `with clock.pause()`.

    step: where the loop begins (not 0 when a run is continued); total: where it ends; skip: how
    many first steps do not count.
    """

    def __init__(self, step: int, total: int, skip: int = FIRST_STEPS):
        self.first = step
        self.step = step
        self.total = total
        self.skip = skip  # counts down; below 0 the steps count

        # Over the steps that count: how many, how long, and how much of that was waiting. The
        # weight of a step falls with time, so that a run that becomes slow on its second day
        # says so.
        self.counted = 0.0
        self.seconds = 0.0
        self.waited = 0.0

        self.begun = time.time()
        self.mark = time.perf_counter()  # when the present step began

    def wait(self, batches):
        """next(batches); the time that it takes counts as waiting for data."""
        before = time.perf_counter()
        batch = next(batches)
        # At 0 the present step is the first one that counts: `tick` comes after it.
        if self.skip <= 0:
            self.waited = KEPT * self.waited + time.perf_counter() - before
        return batch

    def tick(self):
        """Called at the end of each step."""
        # A step lasts from one tick to the next, so waiting for its batch is a part of it.
        now = time.perf_counter()
        self.step += 1
        self.skip -= 1
        if self.skip < 0:
            self.counted = KEPT * self.counted + 1
            self.seconds = KEPT * self.seconds + now - self.mark
        self.mark = now

    @contextlib.contextmanager
    def pause(self):
        """What runs inside the `with` block does not count as a part of any step."""
        # The beginning of the present step is moved by as much as the pause took.
        before = time.perf_counter()
        yield
        self.mark += time.perf_counter() - before

    @property
    def step_seconds(self) -> float:
        """Mean time of a step, in seconds."""
        if self.counted:
            return self.seconds / self.counted

        # No step has counted yet. All the time since the start, divided by the steps so far, is
        # too long, but better than no figure in the first line of the log.
        return (time.time() - self.begun) / max(self.step - self.first, 1)

    @property
    def waiting(self) -> float:
        """Share of the time of a step, 0 to 1, in which the process waits for data.

        Near 0 the device is the bottleneck; a large share means that more --num_workers help.
        """
        return self.waited / self.seconds if self.seconds else 0.0

    @property
    def eta(self) -> str:
        """Time left, as h:mm:ss."""
        return hours(round((self.total - self.step) * self.step_seconds))


class Progress:
    """Called with the number done; prints it and the time left, as often as a reader wants.

    It writes to stderr, on the main process only. On a terminal it rewrites one line, five
    times a second at most; elsewhere (a log file) it adds a line every half minute.
    """

    def __init__(self, what: str, total: int, process: Process):
        self.what = what
        self.total = total
        self.process = process
        self.live = sys.stderr.isatty()  # whether a line can be rewritten
        self.begun = time.perf_counter()
        self.told = self.begun  # when it last printed

    def __call__(self, done: int):
        if not self.process.main:
            return

        # On a terminal the last call always prints, so that the line does not stop at 97 %.
        now = time.perf_counter()
        due = now - self.told >= (0.2 if self.live else 30)
        last = done >= self.total
        if not due and not (last and self.live):
            return
        self.told = now

        # What is left takes as long per piece as what is done. Example: 300 of 1,000 done in 30
        # seconds leave 30 * (1000 / 300 - 1) = 70 seconds.
        left = int((now - self.begun) * (self.total / max(done, 1) - 1))
        text = f"{self.what}: {done:,d} of {self.total:,d}, {hours(left)} left"

        # "\r" moves to the start of the line; the padding wipes out a longer text before it.
        if self.live:
            print(f"\r{text:79s}", end="\n" if last else "", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)


def time_when_done(process: Process) -> float:
    """The time, in seconds, when the device has done all that it was given so far.

    A GPU works through a queue: a call such as x @ y returns before the product is computed. To
    time it, one has to wait for the queue to be empty, at the beginning and at the end.
    """
    if process.device.type != "cpu":
        torch.accelerator.synchronize(process.device)
    return time.perf_counter()


if __name__ == "__main__":
    # Five slow steps, which do not count, then ten steps of a twentieth of a second.
    clock = Clock(0, 30, skip=5)
    batches = iter(range(30))
    for step in range(15):
        clock.wait(batches)
        time.sleep(0.2 if step < 5 else 0.05)
        clock.tick()
    print(f"{clock.step_seconds:.3f} s a step, {clock.eta} for the 15 that are left")
