"""Making sure that all ranks are about to do the same, and saying so when one of them is lost.

A rank that skips an exchange which another enters, or that has ended, leaves the others waiting
for it. Disagreement is found before that by comparing a few numbers. A rank that is lost is found
by the exchange itself, which fails at once or after the time-out of its process group; the message
then names the layer and, as far as they can tell each other through the store of the run, the ranks
that are missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moduli.errors import ConfigError, TrainingError

PATIENCE = 3.0
"""Seconds in which a rank that has met the same failure says so."""


def is_distributed() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def require_agreement(settings: int, step: int, device: torch.device) -> None:
    """Compare what all ranks are about to do.

    Args:
        settings: a number that stands for all settings.
        step: the optimiser step; -1 before the first.
        device: where a message to the other ranks lies.

    Raises:
        ConfigError: a rank has other settings or is at another step; raised on all of them.
    """
    from torch.distributed._functional_collectives import all_gather_tensor

    mine = torch.tensor([settings, step], device=device)
    gathered = _named(lambda: all_gather_tensor(mine, 0, _everyone()))
    found = gathered.view(-1, 2).tolist()
    first = found[0]
    others = [rank for rank, numbers in enumerate(found) if numbers != first]
    if not others:
        return
    rank = others[0]
    if found[rank][0] != first[0]:
        what = "has other settings of gating dropout than rank 0 (p, mode, scope, seed, layers)"
    else:
        what = f"is at step {found[rank][1]}, and rank 0 at step {first[1]}"
    raise ConfigError(
        f"rank {rank} {what}; ranks that decide differently would wait for each other for ever. "
        "Give all ranks the same settings and call set_step with the same step on each "
        f"(ranks that differ from rank 0: {', '.join(map(str, others))})"
    )


def from_rank_0(decisions: Sequence[bool], device: torch.device) -> tuple[bool, ...]:
    """What rank 0 decided."""
    from torch.distributed._functional_collectives import broadcast

    mine = torch.tensor(decisions, device=device)
    said = _named(lambda: broadcast(mine, 0, _everyone()))
    return tuple(said.tolist())


def _named(act: Callable[[], Tensor]) -> Tensor:
    from torch.distributed._functional_collectives import wait_tensor

    def done() -> Tensor:
        found: Tensor = wait_tensor(act())
        return found

    return named_failure(done, "settings of gating dropout", _everyone())


def _everyone() -> Any:
    return dist.group.WORLD


def named_failure(act: Callable[[], Tensor], layer: str, group: Any) -> Tensor:
    """The result of a collective operation.

    Raises:
        TrainingError: it failed, because a rank has ended or does not come.
    """
    try:
        return act()
    except RuntimeError as error:
        mine = dist.get_rank()
        ranks = dist.get_process_group_ranks(group)
        missing = _missing(layer, mine, ranks)
        who = f"; no sign of rank {', '.join(map(str, missing))}" if missing else ""
        raise TrainingError(
            f"{layer}: rank {mine} could not talk to ranks "
            f"{', '.join(str(r) for r in ranks if r != mine)}{who}. A rank has ended, or did not "
            "come within the time-out of the process group; see its own output, "
            f"and start the run again from its last checkpoint ({str(error).splitlines()[0]})"
        ) from error


def _missing(layer: str, mine: int, ranks: Sequence[int]) -> list[int]:
    """Ranks that have not met the failure; none if that cannot be found out."""
    try:
        store = dist.distributed_c10d._get_default_store()
        name = f"moduli lost at {layer} "
        store.set(f"{name}{mine}", "1")
        left = [rank for rank in ranks if rank != mine]
        until = time.monotonic() + PATIENCE
        while left and time.monotonic() < until:
            left = [rank for rank in left if not store.check([f"{name}{rank}"])]
            time.sleep(0.05)
        return left
    except RuntimeError:  # the store was with the rank that is lost
        return []
