"""Our kernels under the name "moduli" in transformers' experts interface.

transformers looks implementations up by name when a model is built or
`model.set_experts_implementation(name)` is called, and has no entry points for packages that bring
one. So `import moduli` adds the name at once where transformers has been imported, and otherwise as
soon as it is; neither imports transformers or torch, and kernels are imported at their first use.

"moduli" chooses a kernel by itself; "moduli:NAME" is one kernel alone, registered on demand.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from moduli.errors import ConfigError, UnknownNameError, nearest
from moduli.on_import import on_import

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "moduli"
REGISTRY = "transformers.integrations.moe"


def register_experts(kernel: str = "auto") -> str:
    """Make a kernel an experts implementation of transformers.

    `import moduli` registers "moduli", which is "auto", by itself. Registering twice changes
    nothing.

    Args:
        kernel: a name of `moduli.experts.kernels.KERNELS`, or "auto".

    Returns:
        The name to give to `model.set_experts_implementation`: "moduli" or "moduli:KERNEL".

    Raises:
        UnknownNameError: there is no kernel of that name.
        ConfigError: this version of transformers has no registry of experts implementations.
    """
    from moduli.experts.kernels import KERNELS

    if kernel not in {"auto", *KERNELS}:
        raise UnknownNameError(f"there is no kernel {kernel!r}. {nearest(kernel, KERNELS)}")
    if not _register(import_module(REGISTRY), kernel):
        raise ConfigError(
            f"{REGISTRY} has no ExpertsInterface to register {NAME!r} in; moduli needs "
            "transformers 5 or newer"
        )
    return _name_of(kernel)


def kernel_of(implementation: str | None) -> str | None:
    """The kernel that an experts implementation stands for; None if it is not one of ours.

    Args:
        implementation: a name in transformers' registry; None, for modules of our own, is "auto".
    """
    ours, _, kernel = (implementation or NAME).partition(":")
    return (kernel or "auto") if ours == NAME else None


def install() -> None:
    """Register "moduli" now or when transformers is imported."""
    on_import(REGISTRY, _register)


def _name_of(kernel: str) -> str:
    return NAME if kernel == "auto" else f"{NAME}:{kernel}"


def _register(registry: ModuleType, kernel: str = "auto") -> bool:
    """Whether there was a registry to register in."""
    interface = getattr(registry, "ExpertsInterface", None)
    if interface is None:
        return False

    def forward(
        module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        from moduli.experts.interface import experts_forward

        return experts_forward(module, hidden_states, top_k_index, top_k_weights, kernel)

    interface.register(_name_of(kernel), forward)
    return True
