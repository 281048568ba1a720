"""Two processes of torch.distributed on gloo; they stay, because importing torch and transformers takes longest."""

import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

# Seconds: until a process that waits for another one that has failed gives up, and until both have started.
TIMEOUT, START = 60, 600


class Pair:
    """Call it with a function of a module, and arguments: both processes run it, and it returns what each returned."""

    def __init__(self, folder):
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        hidden = {"CUDA_VISIBLE_DEVICES": "", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
        with pytest.MonkeyPatch.context() as patch:
            for rank in range(2):
                for name, value in {**hidden, "RANK": str(rank), "LOCAL_RANK": str(rank)}.items():
                    patch.setenv(name, value)
                pipe, other = context.Pipe()
                process = context.Process(target=_work, args=(rank, other, str(folder / "store")), daemon=True)
                process.start()
                self.pipes.append(pipe)
                self.processes.append(process)

    def __call__(self, function, *args, **kwargs):
        for pipe in self.pipes:
            pipe.send((function, args, kwargs))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(START), f"process {rank} does not answer"
            answers.append(pipe.recv())
        failed = [f"process {rank}:\n{answer}" for rank, (done, answer) in enumerate(answers) if not done]
        assert not failed, "\n".join(failed)
        return [answer for _, answer in answers]

    def close(self):
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send(None)
            process.join(10)
            process.kill()


def _work(rank, pipe, store):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=TIMEOUT)
    )
    while (task := pipe.recv()) is not None:
        function, args, kwargs = task
        torch.manual_seed(rank)
        try:
            answer = True, function(*args, **kwargs)
        except Exception:
            answer = False, traceback.format_exc()
        pipe.send(answer)
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """Both processes, for all tests that ask for them."""
    processes = Pair(tmp_path_factory.mktemp("pair"))
    yield processes
    processes.close()
