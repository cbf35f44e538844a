"""Private names of PyTorch 2.11."""

import torch

from pusht_act.runtime.versions import require_version

require_version("torch", "2.11", __name__)


def cpu_has_bf16() -> bool:
    """Return whether this CPU has bfloat16 arithmetic; PyTorch emulates it elsewhere, at a fraction of the speed."""
    # oneDNN's own check; PyTorch has no public one for CPUs.
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
