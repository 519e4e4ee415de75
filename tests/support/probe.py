"""What the loader test runs in spawned workers; a module of its own, free of jax."""

import os
import signal
import sys
import types


class Probe:
    """In place of a Loader: what a worker has imported, or its end."""

    def __init__(self, loader, dies_at=None):
        self.loader, self.dies_at = loader, dies_at

    def __call__(self, planned):
        if planned.step == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.loader(planned.batch)
        return {name.partition(".")[0] for name in sys.modules}


class Numbered:
    """A plan whose batches know their step."""

    def __init__(self, plan):
        self.plan = plan

    def __len__(self):
        return len(self.plan)

    def __getitem__(self, step):
        if step >= len(self.plan):
            raise IndexError(step)
        return types.SimpleNamespace(step=step, batch=self.plan[step])
