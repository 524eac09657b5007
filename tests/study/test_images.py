"""Pictures of a size that is a setting of the run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from moduli.errors import ConfigError
from moduli.study.run import load_model
from moduli.training.settings import FinetuneSettings
from tests.study.conftest import make_plan
from tests.study.test_sample import task_of
from tests.training import tinykinds


def test_images_are_scaled_as_the_settings_say(tmp_path: Path) -> None:
    task = task_of("image-classification", tmp_path / "data")
    model = tinykinds.write_model("image-classification", tmp_path / "base")
    plan = make_plan(model, sources=(), settings=FinetuneSettings(max_steps=1, bf16=False))
    spec = plan.runs([task])[0].spec
    picture = np.zeros((50, 40, 3), dtype=np.uint8)

    def pixels(size: int | None) -> tuple[int, ...]:
        settings = dataclasses.replace(spec.settings, image_size=size)
        _, processor = load_model(dataclasses.replace(spec, settings=settings), task)
        found: tuple[int, ...] = processor(picture, return_tensors="np")["pixel_values"].shape
        return found

    own = pixels(None)
    assert pixels(own[-1] * 2) == (1, 3, own[-1] * 2, own[-1] * 2)
    assert pixels(None) == own


def test_texts_have_no_size(minilm_path: Path, task: object) -> None:
    settings = FinetuneSettings(max_steps=1, bf16=False, image_size=64)
    spec = make_plan(minilm_path, settings=settings).runs([task])[0].spec  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="reads no images"):
        load_model(spec, task)  # type: ignore[arg-type]
