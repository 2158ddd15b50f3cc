"""The steps: forward and backward of each micro-batch, then one update of the adapter.

AdamW (Loshchilov and Hutter, arXiv 1711.05101) without decay, a short linear warm-up and a cosine down to zero,
gradients clipped to norm 1. A step's loss is the mean over its answer tokens, however it is cut into micro-batches.

A loss or a gradient that is not a number ends the training: what was learned until the best epoch's end is kept, and
nothing is an adapter that has not lived through one epoch.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from msgspec import Struct
from torch.utils.checkpoint import checkpoint as recomputed

from edge_rag.errors import MachineError
from edge_rag.learning.events import Event, Step
from edge_rag.learning.job import Job
from edge_rag.learning.trainer import lora
from edge_rag.learning.trainer.batches import Batch, Plan, tensors
from edge_rag.learning.trainer.checkpoint import Cursor, State, Tensors
from edge_rag.learning.trainer.contexts import Contexts
from edge_rag.learning.trainer.control import Control
from edge_rag.learning.trainer.loss import summed_loss
from edge_rag.learning.trainer.sizes import Room, need, reading

WARM_UP = 0.03  # share of the steps
CLIP = 1.0
ABOUT = 1.1


class Outlook(Struct, frozen=True):
    """What a loop reports to: events, and a checkpoint when it is time for one."""

    emit: Callable[[Event], None]
    save: Callable[[State], None]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Of a step, counted from 0: rises linearly to the peak, then falls as half a cosine; never zero."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


class Loop:
    """The training of one adapter. After `run` the adapter in the model is the one to export."""

    def __init__(self, adapted: Any, plan: Plan, job: Job, room: Room, device: torch.device) -> None:
        self._model = adapted.get_base_model()
        self._weights = lora.weights(adapted)
        self._plan, self._job, self._device = plan, job, device
        together = room.batch // reading(plan.facts)
        self._contexts = Contexts(adapted, plan.data, device, room.contexts, together=together)
        self._optimiser = torch.optim.AdamW(self._weights.values(), lr=0.0, weight_decay=0.0)
        self._best: Tensors = {}
        self.cursor = Cursor(room=room)
        self.note = ""
        if room.recompute:
            self._recompute_layers()

    def _recompute_layers(self) -> None:
        """Ours instead of transformers' own gradient checkpointing, which takes the past away from the layers."""
        for layer in self._model.model.layers:
            layer.forward = partial(recomputed, layer.forward, use_reentrant=False, preserve_rng_state=False)

    # --- state ---

    def state(self) -> State:
        """What a checkpoint holds, as of the last whole step."""
        found: Tensors = {f"adapter.{name}": value for name, value in self._weights.items()}
        for name, value in self._weights.items():
            if value in self._optimiser.state:
                found[f"first.{name}"] = self._optimiser.state[value]["exp_avg"]
                found[f"second.{name}"] = self._optimiser.state[value]["exp_avg_sq"]
        return State(self.cursor, found | {f"best.{name}": value for name, value in self._best.items()})

    def restore(self, state: State) -> None:
        """Go on from a checkpoint, with micro-batches cut as there (sums then round the same) if there is room."""
        stored, room = state.tensors, self.cursor.room
        with torch.no_grad():
            for name, value in self._weights.items():
                value.copy_(stored[f"adapter.{name}"])
                if f"first.{name}" in stored:
                    self._optimiser.state[value] = {
                        "step": torch.tensor(float(state.cursor.step)),
                        "exp_avg": stored[f"first.{name}"].to(self._device),
                        "exp_avg_sq": stored[f"second.{name}"].to(self._device),
                    }
        self._best = {name[5:]: value.to(self._device) for name, value in stored.items() if name.startswith("best.")}
        self.cursor = state.cursor
        if not _as_before(self.cursor.room, room):
            self.cursor.room = room

    # --- training ---

    def run(self, control: Control, outlook: Outlook) -> bool:
        """Train to the end; False when it was stopped before, with a checkpoint saved.

        Raises MachineError when losses are no numbers before the first epoch's end, or memory is short for one example.
        """
        began = time.perf_counter() - self.cursor.seconds
        saved = time.perf_counter()
        while self.cursor.step < self._plan.steps:
            loss = self._step(control)
            if loss is None:
                outlook.save(self.state())
                return False
            if not math.isfinite(loss):
                self._fall_back()
                break
            self.cursor.seconds = time.perf_counter() - began
            outlook.emit(self._report(loss))
            if time.perf_counter() - saved >= self._job.checkpoint_seconds:
                outlook.save(self.state())
                saved = time.perf_counter()
        return True

    def _report(self, loss: float) -> Step:
        cursor, steps = self.cursor, self._plan.steps
        return Step(self._plan.epoch(cursor.step - 1) + 1, cursor.step, steps, loss, cursor.tokens, cursor.seconds)

    def _step(self, control: Control) -> float | None:
        """One update; its mean loss, None when we were asked to stop before it was done (it has not happened then)."""
        tokens, answers = self._plan.counts(self.cursor.step)
        total = self._gradients(control, answers)
        if total is None:
            return None
        norm = torch.nn.utils.clip_grad_norm_(list(self._weights.values()), CLIP)
        loss = float(total) / answers
        if not math.isfinite(loss) or not math.isfinite(float(norm)):
            return math.nan
        for group in self._optimiser.param_groups:
            group["lr"] = learning_rate(self.cursor.step, self._plan.steps, self._job.learning_rate)
        self._optimiser.step()
        self._count(float(total), tokens, answers)
        return loss

    def _gradients(self, control: Control, answers: int) -> torch.Tensor | None:
        """Sum the gradients of a step's micro-batches. Begins again with smaller ones when the device has no memory."""
        while True:
            self._optimiser.zero_grad(set_to_none=True)
            try:
                return self._sum(control, answers)
            except torch.OutOfMemoryError:
                self._make_room()

    def _sum(self, control: Control, answers: int) -> torch.Tensor | None:
        assert self.cursor.room is not None
        total = torch.zeros((), device=self._device)
        for part in self._plan.micro_batches(self.cursor.step, self.cursor.room):
            if not control.go_on():
                return None
            loss = self._forward(tensors(self._plan.data, part, self._device))
            (loss / answers).backward()
            total += loss.detach()
        return total

    def _forward(self, batch: Batch) -> torch.Tensor:
        """Summed loss of a micro-batch; only the places where the answer is predicted meet the vocabulary."""
        hidden = answer_states(self._model, self._contexts, batch)
        return summed_loss(self._model.lm_head(hidden), batch, self._job.kl)

    def _make_room(self) -> None:
        """Half of it, until there is no less than one example at a time."""
        torch.cuda.empty_cache()
        room = self.cursor.room
        assert room is not None
        if room.batch < need(self._plan.facts, self._plan.largest(), recompute=room.recompute):
            raise MachineError(
                "the device has too little memory for one example",
                field="learning.memory_mb",
                remedy="free some, set learning.targets to down, or train on the processor",
            )
        self.cursor.room = room.halved()
        self._contexts.limit(self.cursor.room.contexts)

    def _count(self, total: float, tokens: int, answers: int) -> None:
        cursor = self.cursor
        cursor.step += 1
        cursor.tokens += tokens
        cursor.losses += total
        cursor.answers += answers
        if cursor.step % self._plan.per_epoch == 0:
            cursor.loss, cursor.losses, cursor.answers = cursor.losses / cursor.answers, 0.0, 0
            if cursor.loss < cursor.best:
                cursor.best = cursor.loss
                self._best = {name: value.detach().clone() for name, value in self._weights.items()}

    def _fall_back(self) -> None:
        """To the best epoch so far."""
        epoch = self._plan.epoch(self.cursor.step) + 1
        if not self._best:
            raise MachineError(
                f"the loss was not a number in step {self.cursor.step + 1}, before one epoch was done",
                field="learning.learning_rate",
                remedy="set a lower learning.learning_rate, or train on the processor",
            )
        with torch.no_grad():
            for name, value in self._weights.items():
                value.copy_(self._best[name])
        self.cursor.loss = self.cursor.best
        self.note = f"the loss was not a number in epoch {epoch}; the best epoch before it was kept"


def _as_before(before: Room | None, now: Room | None) -> bool:
    """Whether micro-batches that were cut for one room fit into another; what is free varies a little."""
    if before is None or now is None:
        return False
    return before.recompute == now.recompute and before.batch <= now.batch * ABOUT


def answer_states(model: Any, contexts: Contexts, batch: Batch) -> torch.Tensor:
    """The last hidden states [n, hidden] where answer tokens are predicted, with contexts by the base."""
    past = contexts.past(batch.contexts)
    hidden = model.model(
        input_ids=batch.inputs, position_ids=batch.positions, attention_mask=batch.mask, past_key_values=past
    ).last_hidden_state
    return hidden[batch.rows, batch.columns]
