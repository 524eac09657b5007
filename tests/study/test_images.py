"""Pictures of a size that is a setting of the run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

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

    def loaded(size: int | None) -> tuple[Any, torch.Tensor]:
        settings = dataclasses.replace(spec.settings, image_size=size)
        model, processor = load_model(dataclasses.replace(spec, settings=settings), task)
        return model.eval(), processor(picture, return_tensors="pt")["pixel_values"]

    plain, own = loaded(None)
    larger, scaled = loaded(own.shape[-1] * 2)
    assert scaled.shape == (1, 3, own.shape[-1] * 2, own.shape[-1] * 2)
    with torch.no_grad():
        wanted = plain(scaled, interpolate_pos_encoding=True).logits
        torch.testing.assert_close(larger(scaled).logits, wanted)
        larger.save_pretrained(tmp_path / "larger")  # an ordinary model of the new size
        again = type(larger).from_pretrained(tmp_path / "larger").eval()
        assert torch.equal(again(scaled).logits, larger(scaled).logits)
    side = plain.config.patch_size
    with pytest.raises(ConfigError, match=rf"multiple of {side}, such as {3 * side}"):
        loaded(3 * side + 1)


def test_texts_have_no_size(minilm_path: Path, task: object) -> None:
    settings = FinetuneSettings(max_steps=1, bf16=False, image_size=64)
    spec = make_plan(minilm_path, settings=settings).runs([task])[0].spec  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="reads no images"):
        load_model(spec, task)  # type: ignore[arg-type]
