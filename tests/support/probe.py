"""Holds what the loader test runs in spawned workers, apart from anything that imports jax."""

import os
import signal
import sys
import types


class Probe:
    """Stands in for a Loader: reports what a worker has imported, or ends it."""

    def __init__(self, loader, dies_at=None):
        self.loader, self.dies_at = loader, dies_at

    def __call__(self, planned):
        if planned.step == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.loader(planned.batch)
        return {name.partition(".")[0] for name in sys.modules}


class Numbered:
    """Stands in for a schedule whose batches know their step."""

    def __init__(self, plan):
        self.plan = plan

    def __len__(self):
        return len(self.plan)

    def __getitem__(self, step):
        if step >= len(self.plan):
            raise IndexError(step)
        return types.SimpleNamespace(step=step, batch=self.plan[step])
