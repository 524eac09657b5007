"""ModuleFormer in the common tests of transformers.

`test_transformers_suite` alone collects this, in a process of its own where `transformers_tests`
can be imported.
"""

from __future__ import annotations

import unittest
from typing import Any

import torch
from torch import Tensor
from transformers.models.auto import modeling_auto as auto
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin
from transformers_tests.test_training_mixin import TrainingTesterMixin

from moduli.models.moduleformer import (
    ModuleFormerConfig,
    ModuleFormerForCausalLM,
    ModuleFormerForSequenceClassification,
    ModuleFormerModel,
)
from tests.models.moduleformer import small

# The common tests know by these what inputs and labels a class wants.
for _names, _class in (
    (auto.MODEL_MAPPING_NAMES, ModuleFormerModel),
    (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, ModuleFormerForCausalLM),
    (auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, ModuleFormerForSequenceClassification),
):
    _names["moduleformer"] = _class.__name__


class Tester:
    """What the common tests ask of a model: its classes, sizes and inputs."""

    batch_size, seq_length, is_training = 3, 7, True
    num_hidden_layers = small.SIZES["n_layer"]
    num_attention_heads = small.SIZES["n_head"]
    hidden_size = small.WIDTH
    base_model_class = ModuleFormerModel
    causal_lm_class = ModuleFormerForCausalLM

    def __init__(self, **changes: Any) -> None:
        self.changes = changes

    def get_config(self) -> ModuleFormerConfig:
        return small.config(pad_token_id=0, **self.changes)

    def prepare_config_and_inputs_for_common(self) -> tuple[ModuleFormerConfig, dict[str, Tensor]]:
        mask = torch.ones(self.batch_size, self.seq_length, dtype=torch.long)
        mask[1, -2:] = 0
        ids = small.tokens(self.batch_size, self.seq_length)
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


class Common(ModelTesterMixin, GenerationTesterMixin):
    all_model_classes = (
        ModuleFormerModel,
        ModuleFormerForCausalLM,
        ModuleFormerForSequenceClassification,
    )
    # An expert that no token of a batch chose has none.
    test_all_params_have_gradient = False
    test_can_init_all_missing_weights_before_2023 = True  # the year is read off a licence header
    model_tester: Any = None


class ModuleFormerModelTest(Common, TrainingTesterMixin, unittest.TestCase):
    """With projections of keys and values."""

    def setUp(self) -> None:
        self.model_tester = Tester()

    def test_config(self) -> None:
        tester = ConfigTester(self, config_class=ModuleFormerConfig, **small.SIZES)
        tester.run_common_tests()


class PublishedKindModelTest(Common, unittest.TestCase):
    """Keys and values are the input itself; cosine routers; the balance loss is on."""

    def setUp(self) -> None:
        self.model_tester = Tester(
            **small.PUBLISHED_KIND, gate_type="gmm", aux_loss_weight=0.1, concentration_weight=0.1
        )
        self.model_tester.num_attention_heads = 1
