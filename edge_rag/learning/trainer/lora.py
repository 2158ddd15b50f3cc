"""What is adapted: which products of which layers (Hu et al., arXiv 2106.09685), by peft.

The names on both sides stand here once: transformers' modules and llama.cpp's tensors. α is twice the rank, as measured
(docs/learning.md); the second matrix begins at zero, so an untrained adapter changes nothing.
"""

from typing import Any

import torch

from edge_rag.errors import ModelError
from edge_rag.learning.job import Job
from edge_rag.learning.trainer.sizes import Facts

FEED_FORWARD = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
ATTENTION = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
TARGETS = {"down": {"down_proj": "ffn_down"}, "ffn": FEED_FORWARD, "all": FEED_FORWARD | ATTENTION}


def adapted_layers(job: Job, facts: Facts) -> range:
    """The numbers of the layers that are adapted."""
    return range(facts.layers // 2 if job.layers == "last_half" else 0, facts.layers)


def alpha(job: Job) -> int:
    """The α of a job's adapter: its products are scaled by α / rank."""
    return 2 * job.rank


def attach(model: Any, job: Job, facts: Facts) -> Any:
    """The model with an adapter that does nothing yet (a PeftModel). Raises ModelError when it has no such products.

    Its first matrices are drawn from the seed on the processor, so that they do not depend on the device.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(job.seed)
    layers = adapted_layers(job, facts)
    config = LoraConfig(
        r=job.rank,
        lora_alpha=alpha(job),
        target_modules=list(TARGETS[job.targets]),
        layers_to_transform=list(layers),
        layers_pattern="layers",
        task_type="CAUSAL_LM",
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"has no products as they are adapted here: {error}", field=facts.architecture) from error
    if len(weights(adapted)) != 2 * len(TARGETS[job.targets]) * len(layers):
        raise ModelError("not every layer has the products that are adapted", field=facts.architecture)
    return adapted


def weights(adapted: Any) -> dict[str, torch.nn.Parameter]:
    """The adapter's matrices by name, in order: what is trained."""
    return {name: value for name, value in adapted.named_parameters() if ".lora_" in name}
