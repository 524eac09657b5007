"""What is known of the experts of a model after it was run on data: numbers, nothing else.

An `Inspection` is made by `moduli.inspect.inspecting`, or by a run of a study; tables, figures and
pages are functions of it alone. As JSON it holds numbers of five significant digits.

Letters: T tokens, E experts, K experts per token, L layers, W windows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moduli.errors import CheckpointError
from moduli.inspect.files import write_text

VERSION = 1
"""Of the JSON form."""

Vector = tuple[float, ...]
Matrix = tuple[Vector, ...]


@dataclass(frozen=True)
class LayerInspection:
    """The experts of one layer, over all real tokens that were seen.

    Attributes:
        name: of the layer's block in the model.
        num_experts: E.
        top_k: slots of a token, K.
        active: mean number of experts that computed something for a token; below `top_k` where a
            router uses fewer or a capacity drops tokens.
        tokens: real tokens seen.
        padding: share of all positions that were padding.
        load: [E] share of all selections, sums to 1.
        mass: [E] share of all combine weight, sums to 1; equals `load` where weights are 1.
        entropy: mean over tokens of the entropy of softmax(scores), divided by log E: 0 is certain,
            1 is undecided; None for a router without scores.
        load_entropy: entropy of `load`, divided by log E: 0 is one expert only, 1 is equal use.
        dead: experts with less than 1 % of an equal share of the load.
        duplicates: pairs of experts of almost equal parameters, with their cosine similarity.
        coselection: [E, E] share of tokens that chose both; its diagonal is the share that chose
            one. None if it was left out.
        by_domain: `load` of the tokens of one domain only, by domain.
        by_class: `load` of the tokens of one label only, by label.
        quality: `SplitQuality.to_dict()` of the layer's partition of neurons; None where experts
            are no partition of the neurons of a dense FFN.
    """

    name: str
    num_experts: int
    top_k: int
    active: float
    tokens: int
    padding: float
    load: Vector
    mass: Vector
    entropy: float | None
    load_entropy: float
    dead: tuple[int, ...] = ()
    duplicates: tuple[tuple[int, int, float], ...] = ()
    coselection: Matrix | None = None
    by_domain: Mapping[str, Vector] = field(default_factory=dict)
    by_class: Mapping[str, Vector] = field(default_factory=dict)
    quality: Mapping[str, float] | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerInspection:
        """The inverse of `dataclasses.asdict` after JSON."""
        size = _whole(data["num_experts"])
        pairs = data["coselection"]
        return cls(
            **{
                **data,
                "load": _vector(data["load"], size),
                "mass": _vector(data["mass"], size),
                "dead": tuple(map(_whole, data["dead"])),
                "duplicates": tuple((_whole(i), _whole(j), float(s)) for i, j, s in _rows(data, 3)),
                "coselection": None if pairs is None else _matrix(pairs, size, size),
                "by_domain": {k: _vector(v, size) for k, v in data["by_domain"].items()},
                "by_class": {k: _vector(v, size) for k, v in data["by_class"].items()},
            }
        )


@dataclass(frozen=True)
class Selection:
    """Which experts were chosen in the course of training.

    Attributes:
        steps: the last optimiser step of every window.
        shares: [W, E] share of the selections in a window, by layer; a row sums to 1.
        padding: whether selections by padding were counted.
        dropped: whether selections that a capacity dropped were counted.
    """

    steps: tuple[int, ...]
    shares: Mapping[str, Matrix]
    padding: bool = False
    dropped: bool = False

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Selection:
        """The inverse of `dataclasses.asdict` after JSON."""
        steps = tuple(map(_whole, data["steps"]))
        shares = {name: _matrix(rows, len(steps)) for name, rows in data["shares"].items()}
        return cls(**{**data, "steps": steps, "shares": shares})


@dataclass(frozen=True)
class TokenTrace:
    """Where every token of one text went.

    Attributes:
        pieces: the tokens in words.
        experts: by layer, for every token the experts that computed it, the strongest first.
        weights: their combine weights.
    """

    pieces: tuple[str, ...]
    experts: Mapping[str, tuple[tuple[int, ...], ...]]
    weights: Mapping[str, Matrix]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TokenTrace:
        """The inverse of `dataclasses.asdict` after JSON."""
        pieces = tuple(map(str, data["pieces"]))
        weights = {name: _matrix(rows, len(pieces)) for name, rows in data["weights"].items()}
        experts = {
            name: tuple(tuple(map(_whole, row)) for row in rows)
            for name, rows in data["experts"].items()
        }
        for name, rows in experts.items():
            _same(len(rows), len(pieces), f"tokens of {name}")
        return cls(**{**data, "pieces": pieces, "experts": experts, "weights": weights})


@dataclass(frozen=True)
class ActivationPattern:
    """How many neurons of a split FFN are positive, for a few tokens, in blocks of neurons.

    Blocks have the sizes of the experts. Neurons that fire together lie scattered over the blocks
    of the original order, and in few blocks where experts are what they should be.

    Attributes:
        layer: name of the layer's block.
        sizes: [E] neurons per block.
        original: [T, E] positive neurons in blocks of the dense FFN's own order.
        by_expert: [T, E] the same neurons, by expert.
    """

    layer: str
    sizes: tuple[int, ...]
    original: tuple[tuple[int, ...], ...]
    by_expert: tuple[tuple[int, ...], ...]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ActivationPattern:
        """The inverse of `dataclasses.asdict` after JSON."""
        sizes = tuple(map(_whole, data["sizes"]))
        tokens = len(data["original"])
        counts = {
            name: tuple(tuple(map(_whole, row)) for row in data[name])
            for name in ("original", "by_expert")
        }
        for name, rows in counts.items():
            _matrix(rows, tokens, len(sizes))
            _same(len(rows), tokens, name)
        return cls(**{**data, **counts, "sizes": sizes})


@dataclass(frozen=True)
class Inspection:
    """What the experts of a model do.

    Attributes:
        title: what was inspected, in a few words.
        layers: one record per routed layer, in the order of the model.
        overlap: [L, L] normalised mutual information of the first choices of two layers over the
            same tokens, 0 independent, 1 the same up to names; None where layers of two stacks see
            different tokens.
        overlap_by_chance: [L, L] how much of it two layers with these first choices would have if
            neither knew of the other; it grows with the experts and falls with the tokens. Empty
            in records that were made before it was counted.
        domains: names, in the order of the data.
        classes: names of the labels, in the order of their integers; empty if there are none.
        selection: over training, if it was recorded.
        tokens: texts whose tokens were followed.
        activations: of split layers.
    """

    title: str
    layers: tuple[LayerInspection, ...]
    overlap: tuple[tuple[float | None, ...], ...] = ()
    overlap_by_chance: tuple[tuple[float | None, ...], ...] = ()
    domains: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    selection: Selection | None = None
    tokens: tuple[TokenTrace, ...] = ()
    activations: tuple[ActivationPattern, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, rounded to five significant digits."""
        data: dict[str, Any] = _plain({"version": VERSION, **asdict(self)})
        return data

    @classmethod
    def from_dict(cls, data: Any) -> Inspection:
        """The inverse of `to_dict`, but for what rounding lost.

        Raises:
            CheckpointError: it is of another version, or damaged.
        """
        try:
            return cls._from_dict(data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise CheckpointError(
                f"this is not an inspection of version {VERSION} ({what}); make it again with "
                "moduli inspect"
            ) from None

    @classmethod
    def _from_dict(cls, data: Any) -> Inspection:
        if not isinstance(data, dict):
            raise TypeError(f"it is a {type(data).__name__}")
        rest = dict(data)
        if (version := rest.pop("version")) != VERSION:
            raise ValueError(f"its version is {version}")
        layers = tuple(map(LayerInspection.from_dict, data["layers"]))
        overlap = tuple(map(tuple, data["overlap"]))
        by_chance = tuple(map(tuple, data.get("overlap_by_chance", ())))
        for row in (*overlap, *by_chance):
            _same(len(row), len(layers), "columns of overlap")
        selection = data["selection"]
        return cls(
            **{
                **rest,
                "layers": layers,
                "overlap": overlap,
                "overlap_by_chance": by_chance,
                "domains": tuple(data["domains"]),
                "classes": tuple(data["classes"]),
                "selection": None if selection is None else Selection.from_dict(selection),
                "tokens": tuple(map(TokenTrace.from_dict, data["tokens"])),
                "activations": tuple(map(ActivationPattern.from_dict, data["activations"])),
            }
        )

    def table(self) -> tuple[tuple[str, ...], ...]:
        """One row of words per layer, the first row being the titles."""
        from moduli.inspect.tables import layer_rows

        return layer_rows(self)

    def figures(self) -> dict[str, Any]:
        """What it shows as matplotlib figures, by name."""
        from moduli.inspect.figures import figures

        return figures(self)

    def write(self, path: Path) -> None:
        """Write it as JSON, completely or not at all.

        Raises:
            CheckpointError: the file cannot be written.
        """
        write_text(path, json.dumps(self.to_dict(), separators=(",", ":"), allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> Inspection:
        """Read what `write` wrote.

        Raises:
            CheckpointError: there is no such file, it is damaged, or of another version.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            return cls.from_dict(data)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        except OSError as error:
            raise CheckpointError(f"could not read {path}: {error.strerror or error}") from None
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged: it is not JSON ({error})") from None


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{value!r} is not a whole number")
    return value


def _vector(values: Sequence[Any], size: int | None = None) -> Vector:
    found = tuple(float(value) for value in values)
    if size is not None:
        _same(len(found), size, "experts")
    if not all(map(math.isfinite, found)):
        raise ValueError("a number is not finite")
    return found


def _matrix(rows: Sequence[Any], count: int, size: int | None = None) -> Matrix:
    _same(len(rows), count, "rows")
    return tuple(_vector(row, size) for row in rows)


def _rows(data: Mapping[str, Any], width: int) -> list[Any]:
    for row in data["duplicates"]:
        _same(len(row), width, "numbers of a pair")
    return list(data["duplicates"])


def _same(found: int, expected: int, what: str) -> None:
    if found != expected:
        raise ValueError(f"{found} {what} where {expected} were expected")
