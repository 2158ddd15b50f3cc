"""Where training is computed: a CUDA GPU or the processor. It must compute rightly, and reproducibly on the processor.

Everything is float32. On CUDA matrix products use TF32; bfloat16 gave NaN losses on Qwen2.5 (docs/log.md).
"""

import resource

import numpy as np
import torch

from edge_rag.errors import MachineError
from edge_rag.learning.job import Job
from edge_rag.native import device as machine

TOLERANCE = 1e-4  # of the self-test, relative to the largest value


def prepare(job: Job) -> torch.device:
    """The device of a job, tested and set up. Raises MachineError when it is missing or computes wrongly."""
    device = _choose(job.device)
    torch.set_num_threads(job.threads or machine.physical_cores())
    torch.manual_seed(job.seed)
    self_test(device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    else:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing reads it, and filling takes time
    return device


def _choose(wanted: str) -> torch.device:
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise MachineError(
            "there is no CUDA GPU that this torch can use", field="learning.device", remedy="set learning.device to cpu"
        )
    return torch.device(wanted)


def self_test(device: torch.device) -> None:
    """Compare a product and its gradient with numpy's. Raises MachineError when they differ."""
    random = np.random.default_rng(0)
    inputs, weights = (random.normal(size=shape).astype(np.float32) for shape in ((33, 65), (65, 17)))
    outputs = np.tanh(inputs @ weights)
    gradient = inputs.T @ (2 * outputs * (1 - outputs**2))
    try:
        found = torch.tensor(weights, device=device, requires_grad=True)
        computed = torch.tanh(torch.tensor(inputs, device=device) @ found)
        (computed**2).sum().backward()
        pairs = [(outputs, computed.detach().cpu().numpy()), (gradient, found.grad.cpu().numpy())]
    except RuntimeError as error:
        raise MachineError(f"{device} cannot compute: {error}", remedy="set learning.device to cpu") from error
    for expected, actual in pairs:
        if not np.allclose(actual, expected, rtol=0, atol=TOLERANCE * float(np.abs(expected).max())):
            raise MachineError(f"{device} computes wrong results", remedy="set learning.device to cpu")


def available(device: torch.device) -> int:
    """Bytes that can be used on a device now. Where a GPU shares the machine's memory, that of the machine."""
    host = machine.host_memory()
    if device.type == "cpu" or host.kind == "integrated":
        return host.available
    return int(torch.cuda.mem_get_info(device)[0])


def peak(device: torch.device) -> int:
    """Most bytes that this process has used at once: of the GPU, or of the machine's memory."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
