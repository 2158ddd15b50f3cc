"""What is minimised, on answer tokens only: the distance to the teacher's distribution, and to its words.

Of the teacher the 16 likeliest tokens of each place are known. They and one more bucket, all the others together, make
a distribution of 17; the student's is put into the same buckets. KL(teacher ‖ student) over these never exceeds that
over the whole vocabulary, and unlike a distribution renormalised over the 16 it notices probability that leaks
elsewhere. KL generalises, the words memorise; a mix was measured best (docs/learning.md).
"""

import torch

from edge_rag.learning.trainer.batches import Batch

LEAST = 1e-6  # of the rest bucket: both sides round to less than that


def summed_loss(logits: torch.Tensor, batch: Batch, kl: float) -> torch.Tensor:
    """The loss, summed over answer tokens. logits [n, vocabulary]; `kl` is the share of the distance to the teacher."""
    norms = torch.logsumexp(logits, dim=-1)
    loss = torch.zeros((), device=logits.device)
    if kl > 0:
        student = logits.gather(1, batch.top_ids) - norms[:, None]
        loss = loss + kl * bucketed_kl(batch.top_logprobs, student).sum()
    if kl < 1:
        words = logits.gather(1, batch.targets[:, None])[:, 0]
        loss = loss + (1 - kl) * (norms - words).sum()
    return loss


def bucketed_kl(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL [n] of two distributions, by the logarithms [n, k] of their probabilities of the same tokens."""
    shared = (teacher.exp() * (teacher - student)).sum(dim=-1)
    left, right = _rest(teacher), _rest(student)
    return shared + left.exp() * (left - right)


def _rest(logs: torch.Tensor) -> torch.Tensor:
    return torch.log((1 - logs.exp().sum(dim=-1)).clamp(min=LEAST))
