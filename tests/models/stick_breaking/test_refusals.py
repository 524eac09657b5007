"""What stick-breaking attention does not accept, and what it says then."""

from typing import Any

import pytest
import torch

from moduli.errors import ConfigError, UnknownNameError
from moduli.models.stick_breaking import stick_breaking_attention, stick_breaking_weights

pytestmark = pytest.mark.usefixtures("without_shape_checks")


def call(**changed: Any) -> Any:
    given: dict[str, Any] = {
        "query": torch.randn(2, 4, 3, 8),
        "key": torch.randn(2, 2, 5, 8),
        "value": torch.randn(2, 2, 5, 6),
    }
    return stick_breaking_attention(**given | changed)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"query": torch.randn(2, 3, 3, 8)}, r"3 heads of queries .* over 2 heads of keys"),
        ({"query": torch.randn(2, 4, 6, 8)}, r"6 queries but 5 keys"),
        ({"query": torch.randn(2, 4, 0, 8)}, r"at least one query"),
        ({"query": torch.randn(2, 4, 3, 7)}, r"\[2, 4, 3, 7\] and key .* \[2, 2, 5, 8\]"),
        ({"query": torch.randn(1, 4, 3, 8)}, r"batch and width must be the same"),
        ({"query": torch.randn(4, 3, 8)}, r"query is torch.float32 \[4, 3, 8\].*\[batch, heads"),
        ({"key": torch.ones(2, 2, 5, 8, dtype=torch.long)}, r"key is torch.int64.*floating-point"),
        ({"value": torch.randn(2, 2, 4, 6)}, r"value .* differ in width only"),
        ({"key_mask": torch.ones(2, 3, dtype=torch.bool)}, r"\[2, 3\]; expected a bool .*\[2, 5\]"),
        ({"key_mask": torch.ones(2, 5)}, r"torch.float32 .*attention_mask.bool\(\)"),
        ({"segments": torch.ones(2, 3, dtype=torch.long)}, r"segments .*\[2, 3\].*\[2, 5\]"),
        ({"segments": torch.ones(2, 5)}, r"segments is torch.float32.*integer"),
        ({"early_exit": 1.5}, r"early_exit is 1.5; .*0 to below 1"),
    ],
)
def test_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        call(**changed)


def test_an_unknown_backend_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"no backend 'block'\. Did you mean 'blocked'"):
        call(backend="block")


def test_weights_refuse_the_same() -> None:
    with pytest.raises(ConfigError, match="6 queries but 5 keys"):
        stick_breaking_weights(torch.randn(1, 1, 6, 4), torch.randn(1, 1, 5, 4))
