"""How often the host waits for the device: the list that the rehearsal holds the code to, and docs/gpu.md shows."""

from __future__ import annotations

from typing import NamedTuple


class Budget(NamedTuple):
    """``reads`` of the device by the host, ``copies`` from host to device, and ``blocking`` ones among these."""

    reads: int
    copies: int
    blocking: int = 0


BUDGETS: dict[str, Budget] = {
    "stage 2, delta": Budget(2, 28),
    "stage 2, delta, chunks of 3": Budget(2, 22),
    "stage 2, paper": Budget(2, 30),
    "stage 2, paper, the step's time": Budget(2, 30),
    "stage 2, junction": Budget(2, 28),
    "stage 2, junction, cached": Budget(2, 22),
    "stage 2, channel": Budget(2, 28),
    "stage 2, causal": Budget(2, 18),
    "stage 2, frame_diagonal": Budget(2, 24),
    "stage 2, skip_layer": Budget(2, 18),
    "validation of a clip": Budget(0, 51),
    "stage 3, critic on a rollout of its own": Budget(1, 75),
    "stage 3, critic on the same rollout": Budget(1, 2),
    "stage 3, student": Budget(4, 89),
    "sampling, renoise, the first chunk": Budget(2, 13),
    "sampling, renoise, a later chunk": Budget(1, 7),
    "sampling, euler, the first chunk": Budget(2, 10),
    "sampling, euler, a later chunk": Budget(1, 4),
    "sampling, unipc, the first chunk": Budget(4, 28, 18),
    "sampling, unipc, a later chunk": Budget(3, 22, 18),
    "sampling, guided by text, the first chunk": Budget(3, 13),
    "sampling, guided by text, a later chunk": Budget(1, 9),
    "sampling, guided by text, decoder alone, the first chunk": Budget(3, 13),
    "sampling, guided by text, decoder alone, a later chunk": Budget(1, 9),
    "sampling, guided by corruption, the first chunk": Budget(3, 14),
    "sampling, guided by corruption, a later chunk": Budget(1, 10),
    "sampling, baseline, the first chunk": Budget(2, 11),
    "sampling, baseline, a later chunk": Budget(1, 7),
    "sampling, baseline, blocks skipped, the first chunk": Budget(6, 11),
    "sampling, baseline, blocks skipped, a later chunk": Budget(5, 7),
    "start frames, encoded and decoded": Budget(1, 0),
    "sampling, to pixels, the first chunk": Budget(4, 17),
    "sampling, to pixels, a later chunk": Budget(2, 9),
    "a clip of the teacher, 4 steps": Budget(0, 7),
    "a clip decoded": Budget(1, 0),
    "from scratch, SCD-B, actions": Budget(2, 23),
    "from scratch, Causal DiT-B, actions": Budget(2, 20),
    "from scratch, SCD-B, labels, sample by sample": Budget(2, 22),
    "two frames predicted, SCD-B": Budget(3, 20),
    "two frames predicted, Causal DiT-B": Budget(3, 20),
    "frames of the host through the tokenizer": Budget(0, 1),
    "a micro-batch of the tokenizer's training": Budget(3, 2),
    "prompts encoded together": Budget(1, 2),
    "a prompt encoded while training": Budget(2, 2),
    "probe similarity, a small model": Budget(28, 20),
    "probe pca, a small model": Budget(20, 20),
    "probe attention, a small model": Budget(6, 68),
    "probe skip, a small model": Budget(239, 192),
    "probe diagonal, a small model": Budget(53, 89),
    "probe leave_one_out, a small model": Budget(35, 40),
    "two small clips generated and written": Budget(3, 14, 6),
    "two small validation videos": Budget(126, 148, 124),
}
