"""Which experts are chosen in the course of training: a callback of the stock `Trainer`.

    selection = SelectionOverTraining(every=100)
    trainer = Trainer(..., callbacks=[selection])
    trainer.train()
    selection.result()

Every `every` optimiser steps a window is closed: the selections of every expert in the training
forward passes since the last one, as shares. EMoE's reference, and so its figure, also counts the
choices of padding and those that a capacity drops (`padding=True, dropped=True`). Evaluation in
between is not counted. A checkpoint holds what was counted so far, so that a killed and resumed
run has the record of an undisturbed one.

With several processes each counts what it sees. Where gradient checkpointing runs a layer twice,
both count, which leaves the shares as they are.

Letters: T tokens, E experts, W windows.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from moduli.errors import CheckpointError, ConfigError, ModelError
from moduli.inspect.measure import real_tokens, shares
from moduli.inspect.record import Selection
from moduli.inspect.watching import Seen, expert_layers, listen
from moduli.routing import Routing


class SelectionOverTraining(TrainerCallback, ExportableState):
    """Counts selections in windows of training; see the top of the file.

    Args:
        every: optimiser steps in a window.
        padding: count what padding chose, too.
        dropped: count choices that a capacity dropped, too.
        at_most: windows of equal length, so many or fewer, for which `every` is chosen when
            training begins: only then is it known how many steps there will be.

    Raises:
        ConfigError: `every` or `at_most` is below 1.
    """

    def __init__(
        self,
        every: int = 100,
        padding: bool = False,
        dropped: bool = False,
        *,
        at_most: int | None = None,
    ) -> None:
        if every < 1:
            raise ConfigError(f"every is {every}; a window has at least 1 step")
        if at_most is not None and at_most < 1:
            raise ConfigError(f"at_most is {at_most}; there is at least 1 window")
        self.every = every
        self.at_most = at_most
        self.padding = padding
        self.dropped = dropped
        self.steps: list[int] = []
        self.windows: dict[str, list[list[int]]] = {}  # [W, E] by layer
        self.counts: dict[str, Tensor] = {}  # [E] by layer, of the window that is open
        self._undo = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start to count; after a resume go on from what the checkpoint holds.

        Raises:
            ModelError: the model has no experts.
            CheckpointError: the checkpoint was counted with other settings.
        """
        self.close()
        if self.at_most is not None:
            self.every = math.ceil(state.max_steps / self.at_most)
        model = kwargs["model"]
        name = type(self).__name__
        stored = state.stateful_callbacks.get(name) if state.global_step else None
        sizes = {layer.name: layer.num_experts for layer in expert_layers(model)}
        self.steps, self.windows = [], {layer: [] for layer in sizes}
        self.counts = {layer: torch.zeros(size, dtype=torch.long) for layer, size in sizes.items()}
        if stored is not None:
            self._go_on(stored)
        # A checkpoint of a run without this callback lacks the entry that Trainer updates.
        state.stateful_callbacks[name] = self.state()

        def see(layer: str, routing: Routing, real: Tensor | None) -> None:
            if not model.training:
                return
            seen = Seen(layer, routing, None if self.padding else real)
            keep = real_tokens(seen)[:, None].expand_as(routing.experts)
            # Where every expert has a slot (expert choice), idle ones were not chosen at all.
            chosen = self.dropped and routing.experts.shape[1] < sizes[layer]
            if routing.active is not None and not chosen:
                keep = keep & routing.active
            found = torch.bincount(routing.experts[keep], minlength=sizes[layer])
            self.counts[layer] = self.counts[layer].to(found.device) + found

        self._undo.enter_context(listen(model, see))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the window if it is full."""
        if state.global_step % self.every == 0:
            self._close_window(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the last window, which may be shorter, and stop to count."""
        if state.global_step and (not self.steps or self.steps[-1] != state.global_step):
            self._close_window(state.global_step)
        self.close()

    def close(self) -> None:
        """Stop to count; only needed after training that raised."""
        self._undo.close()

    def result(self) -> Selection:
        """The record so far, of the windows that are closed.

        Raises:
            ModelError: nothing was counted.
        """
        if not self.steps:
            raise ModelError("no window of training was recorded; train with this callback first")
        found = {
            layer: tuple(shares(torch.tensor(row).double()) for row in rows)
            for layer, rows in self.windows.items()
        }
        return Selection(tuple(self.steps), found, padding=self.padding, dropped=self.dropped)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds; called by Trainer."""
        return {
            "args": {"every": self.every, "padding": self.padding, "dropped": self.dropped},
            "attributes": {
                "steps": list(self.steps),
                "windows": {layer: [list(row) for row in w] for layer, w in self.windows.items()},
                "open": {layer: counts.tolist() for layer, counts in self.counts.items()},
            },
        }

    def _go_on(self, stored: Any) -> None:
        mine = self.state()["args"]
        given, found = stored["args"], stored["attributes"]
        if given != mine or found["windows"].keys() != self.windows.keys():
            raise CheckpointError(
                f"the checkpoint recorded selection with {given} over {len(found['windows'])} "
                f"layers, this run has {mine} over {len(self.windows)}; resume with the same "
                "settings"
            )
        self.steps, self.windows = list(found["steps"]), found["windows"]
        self.counts = {layer: torch.tensor(counts) for layer, counts in found["open"].items()}

    def _close_window(self, step: int) -> None:
        self.steps.append(step)
        for layer, counts in self.counts.items():
            self.windows[layer].append(counts.tolist())
            self.counts[layer] = torch.zeros_like(counts)
