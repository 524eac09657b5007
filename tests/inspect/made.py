"""Inspections that nobody measured: numbers drawn at random, with the sums they must have."""

from __future__ import annotations

import numpy as np

from moduli.inspect.record import (
    ActivationPattern,
    Inspection,
    LayerInspection,
    Selection,
    TokenTrace,
)

DOMAINS = ("books", "dvd", "electronics", "kitchen")
PIECES = (
    "[CLS]",
    "a",
    "##trig",
    "##uing",
    "read",
    ",",
    "could",
    "not",
    "put",
    "down",
    ".",
    "[SEP]",
)


def made_layer(name: str, E: int, K: int, random: np.random.Generator) -> LayerInspection:
    load = random.dirichlet(np.full(E, 0.7))
    load[E // 3] = 0.0
    load /= load.sum()
    together = random.random((E, E)) * K * np.minimum(load, load[:, None]) / 2
    together = (together + together.T) / 2
    dead = tuple(int(e) for e in np.flatnonzero(E * load < 0.01))

    def near() -> tuple[float, ...]:
        shares = load * random.uniform(0.5, 1.5, E)
        return tuple((shares / shares.sum()).tolist())

    return LayerInspection(
        name=name,
        num_experts=E,
        top_k=K,
        active=float(K),
        tokens=3412,
        padding=0.212,
        load=tuple(load.tolist()),
        mass=near(),
        entropy=0.71,
        load_entropy=0.83,
        dead=dead,
        duplicates=((1, 2, 0.981),),
        coselection=tuple(map(tuple, together.tolist())),
        by_domain={domain: near() for domain in DOMAINS},
        by_class={"negative": near(), "positive": near()},
        quality={"total": 1497.0, "objective": 1323.0, "explained": 174.0, "share": 0.116},
    )


def made_inspection(E: int = 16, K: int = 4, L: int = 2, windows: int = 20) -> Inspection:
    """An inspection in which every part is there."""
    random = np.random.default_rng(0)
    names = [f"encoder.layer.{8 + 2 * i}" for i in range(L)]
    experts = {
        name: tuple(
            tuple(map(int, random.choice(E, size=K, replace=False, p=random.dirichlet(np.ones(E)))))
            for _ in PIECES
        )
        for name in names
    }
    sizes = (48,) * E
    counts = random.poisson(0.6, (60, E))
    grouped = random.poisson(4.0, (60, E)) * (random.random((60, E)) < 0.15)
    overlap = random.uniform(0.1, 0.6, (L, L))
    overlap = (overlap + overlap.T) / 2
    np.fill_diagonal(overlap, 1.0)
    return Inspection(
        title="EMoE-MiniLM on sentiment",
        layers=tuple(made_layer(name, E, K, random) for name in names),
        overlap=tuple(map(tuple, overlap.tolist())),
        overlap_by_chance=tuple((0.04,) * L for _ in names),
        domains=DOMAINS,
        classes=("negative", "positive"),
        selection=Selection(
            steps=tuple(100 * (w + 1) for w in range(windows)),
            shares={
                name: tuple(map(tuple, random.dirichlet(np.ones(E), windows).tolist()))
                for name in names
            },
        ),
        tokens=(
            TokenTrace(
                pieces=PIECES,
                experts=experts,
                weights={name: tuple((1.0,) * K for _ in PIECES) for name in names},
            ),
        ),
        activations=tuple(
            ActivationPattern(
                layer=name,
                sizes=sizes,
                original=tuple(map(tuple, counts.tolist())),
                by_expert=tuple(map(tuple, grouped.tolist())),
            )
            for name in names
        ),
    )
