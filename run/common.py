"""What any file may use, and what itself imports nothing of ours: errors that a user can mend, processes, randomness, memory."""

import datetime
import os
import resource
import sys

import numpy as np
import psutil
import torch
import torch.distributed as dist


class UserError(ValueError):
    """Something the user can mend; the message is one sentence that says how."""


def run_script(name: str, main) -> None:
    """main(command line); a UserError becomes its sentence on stderr and exit code 2, and so does memory that is full."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError) and "can't allocate" not in str(error):
            raise
        advice = "nothing that was saved is lost, ask for less at a time (train.py: --memory-limit, --micro)"
        print(f"{name}: memory is full ({str(error).split('. ')[0]}): {advice}", file=sys.stderr)
        sys.exit(2)


def check_device(device) -> None:
    """UserError for a device that torch does not have here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"torch finds no device {device}: give device cpu, or the name of one that is here") from None


def step_generator(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """All randomness of a training step: a CPU generator that depends on (seed, step, stream) alone.
    Streams: 0 updates, 1 calibration, 2 splits of layers, 3 trajectories, 4 drawn latents of a cache, 5 the closing report."""
    state = np.random.SeedSequence([seed, step, stream]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 ^ int(state[1]))


def join_processes(device: str) -> None:
    """Become a process of the torchrun that started this process, if one did; each has a GPU of its own."""
    if "RANK" in os.environ and not dist.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        hours = datetime.timedelta(hours=3)  # between two exchanges one process may calibrate FLUX
        # with GPUs, gloo exchanges what waits in main memory
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=hours)


def process_index() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def process_count() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1


def wait_for_all() -> None:
    """Returns when all processes have called it."""
    if dist.is_initialized():
        dist.barrier()


def local_rows() -> slice:
    """Rows of a batch that this process works on; every process draws the whole batch, so that their number changes nothing."""
    return slice(process_index(), None, process_count())


def average_over_processes(tensors: list[torch.Tensor], *numbers: float) -> list[float]:
    """Tensors become their averages over the processes, in place, in one all-reduce; the averages of the numbers are returned."""
    if process_count() == 1:
        return list(numbers)
    flat = torch.cat([tensor.flatten() for tensor in tensors] + [tensors[0].new_tensor(numbers)])
    dist.all_reduce(flat)
    *averages, means = flat.div_(process_count()).split([tensor.numel() for tensor in tensors] + [len(numbers)])
    for tensor, average in zip(tensors, averages, strict=True):
        tensor.copy_(average.view_as(tensor))
    return means.tolist()


def free_memory() -> int:
    """Bytes of main memory that are free or can be freed."""
    return psutil.virtual_memory().available


def peak_memory(device: str) -> int:
    """Bytes that this process held at most: of the GPU's memory, or (on a CPU) of main memory."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
