"""What a method is: a frozen config that knows how to apply itself to a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import nn

from moduli.errors import ConfigError, nearest
from moduli.surgery.conversion import (
    OwnedRecipe,
    Progress,
    Recipe,
    own_model,
    restore_owned,
    restore_split,
    split_model,
)
from moduli.surgery.inputs import Batches, as_list
from moduli.surgery.layout import Layout
from moduli.surgery.partition.observe import Sample
from moduli.surgery.report import ConversionReport


@dataclass(frozen=True)
class Method:
    """Base of all methods: a dataclass whose fields are the settings, JSON-able.

    Class attributes:
        name: on the command line and in checkpoints.
        summary: one line for lists.
        modular: whether `apply` makes layers with experts, which merging makes dense again.
        routes: whether those layers have a router, so that there is routing to look at.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    modular: ClassVar[bool] = True
    routes: ClassVar[bool] = True

    @property
    def borrows(self) -> bool:
        """Whether its experts are groups of the model's own neurons, without copies."""
        return False

    def apply(
        self,
        model: nn.Module,
        *,
        batch: Batches | None = None,
        progress: Progress | None = None,
    ) -> ConversionReport | None:
        """Change `model` in place.

        Args:
            model: a dense transformers model.
            batch: keyword arguments of its forward, to measure output errors on real inputs, or
                several of those for methods that look at data.
            progress: see `Progress`.
        """
        raise TypeError(f"{type(self).__name__} does not define apply(model)")

    def restore(self, model: nn.Module, layout: Layout, permuted: bool) -> None:
        """Make routed layers again from a stored layout, without any search.

        Args:
            model: the dense model of a checkpoint.
            layout: from the checkpoint.
            permuted: the neurons are in expert order already.
        """
        raise TypeError(f"{type(self).__name__} makes no routed layers to restore")

    def to_dict(self) -> dict[str, Any]:
        """Settings as JSON-able values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`.

        Raises:
            ConfigError: a setting that the method does not have.
        """
        known = {f.name for f in dataclasses.fields(cls) if f.init}
        for key in data:
            if key not in known:
                raise ConfigError(f"{cls.name} has no setting {key!r}. {nearest(key, known)}")
        return cls(**data)


def settle(config: Any) -> None:
    """What `__post_init__` of every method with experts does first: freeze `layers`, check numbers.

    Args:
        config: a method with the settings `layers` and `num_experts`, and `top_k` if it routes.

    Raises:
        ConfigError: a setting that has to be a whole number and is none, or one layer instead of a
            list; no expert, or more experts per token than there are.
    """
    for setting in dataclasses.fields(config):
        value = getattr(config, setting.name)
        whole = setting.type == "int" or (setting.type == "int | None" and value is not None)
        if whole and not hasattr(value, "__index__"):
            raise ConfigError(f"{setting.name} is {value!r}; it has to be a whole number")
    if isinstance(config.layers, int):
        raise ConfigError(
            f"layers is {config.layers}; give a list, [{config.layers}], or 'last:{config.layers}'"
        )
    if not isinstance(config.layers, str):
        object.__setattr__(config, "layers", tuple(config.layers))
    if config.num_experts < 1:
        raise ConfigError(f"num_experts is {config.num_experts}; at least 1 is needed")
    if not 1 <= getattr(config, "top_k", 1) <= config.num_experts:
        raise ConfigError(
            f"top_k is {config.top_k}, but there are {config.num_experts} experts; "
            f"choose 1 to {config.num_experts}"
        )


class SplitMethod(Method):
    """A method that groups the neurons of FFNs into experts; it says how by a `Recipe`."""

    @property
    def borrows(self) -> bool:
        """Always: its experts are groups of neurons."""
        return True

    def recipe(self, progress: Progress | None) -> Recipe:
        """What `moduli.surgery.conversion` needs to know."""
        raise TypeError(f"{type(self).__name__} does not define recipe(progress)")

    def apply(
        self,
        model: nn.Module,
        *,
        batch: Batches | None = None,
        progress: Progress | None = None,
    ) -> ConversionReport:
        """Split the chosen FFNs into experts; see `moduli.convert`."""
        return split_model(model, self.recipe(progress), batch=batch, progress=progress)

    def restore(self, model: nn.Module, layout: Layout, permuted: bool) -> None:
        """Route a model that was read from a checkpoint."""
        restore_split(model, layout, self.recipe(None).split, permuted=permuted)


class OwnedMethod(Method):
    """A method whose experts have parameters of their own; it says how by an `OwnedRecipe`."""

    def recipe(self) -> OwnedRecipe:
        """What `moduli.surgery.conversion` needs to know."""
        raise TypeError(f"{type(self).__name__} does not define recipe()")

    def apply(
        self,
        model: nn.Module,
        *,
        batch: Batches | None = None,
        progress: Progress | None = None,
    ) -> ConversionReport:
        """Replace the chosen FFNs by experts; see `moduli.convert`."""
        return own_model(model, self.recipe(), batch=batch, progress=progress)

    def restore(self, model: nn.Module, layout: Layout, permuted: bool) -> None:
        """Give a model that was read from a checkpoint its experts again."""
        restore_owned(model, layout, self.recipe().own)


class DataMethod(Method):
    """A method that may look at data, and whose settings say whether its experts are groups of
    neurons or have parameters of their own: its recipe is of one kind or of the other."""

    @property
    def borrows(self) -> bool:
        """As its settings say."""
        return isinstance(self.recipe(None, None), Recipe)

    def recipe(self, progress: Progress | None, sample: Sample | None) -> Recipe | OwnedRecipe:
        """What `moduli.surgery.conversion` needs to know.

        Args:
            progress: see `Progress`.
            sample: the model and what was given to look at; None when nothing is searched for.
        """
        raise TypeError(f"{type(self).__name__} does not define recipe(progress, sample)")

    def apply(
        self,
        model: nn.Module,
        *,
        batch: Batches | None = None,
        progress: Progress | None = None,
    ) -> ConversionReport:
        """Make experts of the chosen FFNs; see `moduli.convert`."""
        recipe = self.recipe(progress, Sample(model, as_list(batch)))
        if isinstance(recipe, OwnedRecipe):
            return own_model(model, recipe, batch=batch, progress=progress)
        return split_model(model, recipe, batch=batch, progress=progress)

    def restore(self, model: nn.Module, layout: Layout, permuted: bool) -> None:
        """Route a model that was read from a checkpoint."""
        recipe = self.recipe(None, None)
        if isinstance(recipe, OwnedRecipe):
            restore_owned(model, layout, recipe.own)
        else:
            restore_split(model, layout, recipe.split, permuted=permuted)


__all__ = ["DataMethod", "Method", "OwnedMethod", "Progress", "SplitMethod", "settle"]
