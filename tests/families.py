"""Tiny random models of every family that moduli knows, and inputs that fit them.

`tests.tiny` has the four that most tests use; the support table and the family tests use these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tr
from torch import Tensor, nn

from tests import tiny
from tests.tiny import LAYERS, NEURONS, VOCAB, WIDTH

Inputs = dict[str, Tensor]

_ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": NEURONS,
    "max_position_embeddings": 40,
    "num_labels": 3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": NEURONS,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_IMAGE = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": NEURONS,
    "image_size": 8,
    "patch_size": 2,
    "num_labels": 3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_SEQ2SEQ = {
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": NEURONS,
    "decoder_ffn_dim": NEURONS,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}


_AUDIO = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": NEURONS,
    "conv_dim": (8, 8),
    "conv_stride": (4, 2),
    "conv_kernel": (8, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
    "num_labels": 3,
    "hidden_dropout": 0.0,
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
}


def _t5(kind: str) -> Any:
    config = tr.T5Config(
        vocab_size=VOCAB,
        d_model=WIDTH,
        d_kv=8,
        d_ff=NEURONS,
        num_layers=LAYERS,
        num_decoder_layers=LAYERS,
        num_heads=2,
        dropout_rate=0.0,
        feed_forward_proj=kind,
        decoder_start_token_id=0,
    )
    return tr.T5ForConditionalGeneration(config)


def _whisper() -> Any:
    config = tr.WhisperConfig(
        **_SEQ2SEQ,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=32,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return tr.WhisperForConditionalGeneration(config)


def _ast() -> Any:
    config = tr.ASTConfig(
        **{k: v for k, v in _IMAGE.items() if k != "image_size"},
        frequency_stride=2,
        time_stride=2,
        max_length=8,
        num_mel_bins=8,
    )
    return tr.ASTForAudioClassification(config)


def _clip() -> Any:
    shared = {
        "hidden_size": WIDTH,
        "intermediate_size": NEURONS,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "projection_dim": WIDTH,
    }
    text = {"vocab_size": VOCAB, "max_position_embeddings": 40, "eos_token_id": 2}
    config = tr.CLIPConfig(
        text_config={**shared, **text},
        vision_config={**shared, "image_size": 8, "patch_size": 2},
        projection_dim=WIDTH,
    )
    return tr.CLIPModel(config)


def _siglip() -> Any:
    shared = {
        "hidden_size": WIDTH,
        "intermediate_size": NEURONS,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
    }
    config = tr.SiglipConfig(
        text_config={**shared, "vocab_size": VOCAB, "max_position_embeddings": 40},
        vision_config={**shared, "image_size": 8, "patch_size": 2},
    )
    return tr.SiglipModel(config)


def _vitmae() -> Any:
    config = tr.ViTMAEConfig(
        **{k: v for k, v in _IMAGE.items() if k != "num_labels"},
        decoder_hidden_size=WIDTH,
        decoder_num_hidden_layers=LAYERS,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=NEURONS,
    )
    return tr.ViTMAEForPreTraining(config)


class OwnFFN(nn.Module):
    """An FFN with names that no table knows."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.expand = nn.Linear(WIDTH, NEURONS)
        self.widen = nn.Linear(WIDTH, NEURONS) if gated else None
        self.shrink = nn.Linear(NEURONS, WIDTH)
        self.nonlinearity = nn.GELU()
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.nonlinearity(self.expand(x))
        hidden = hidden if self.widen is None else hidden * self.widen(x)
        return self.shrink(self.drop(hidden))


class TimmMlp(nn.Module):
    """The parts of timm's MLP, by its names and in its order."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, NEURONS)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(0.0)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(NEURONS, WIDTH)
        self.drop2 = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


def _with(make: Callable[[], nn.Module]) -> Any:
    """A ViT whose FFNs are not those of transformers."""
    model = tiny.vit()
    for layer in model.vit.layers:
        layer.mlp = make()
    return model


def _decoder(config: Any, model: Any, **changes: Any) -> Callable[[], Any]:
    return lambda: model(config(**{**_DECODER, **changes}))


def _encoder(config: Any, model: Any, **changes: Any) -> Callable[[], Any]:
    return lambda: model(config(**{**_ENCODER, **changes}))


def _image(config: Any, model: Any, **changes: Any) -> Callable[[], Any]:
    return lambda: model(config(**{**_IMAGE, **changes}))


TEXT_ENCODERS: dict[str, Callable[[], Any]] = {
    "bert": tiny.bert,
    "roberta": _encoder(tr.RobertaConfig, tr.RobertaForSequenceClassification, pad_token_id=0),
    "electra": _encoder(tr.ElectraConfig, tr.ElectraForSequenceClassification),
    "megatron-bert": _encoder(tr.MegatronBertConfig, tr.MegatronBertForSequenceClassification),
    "xlm": lambda: tr.XLMForSequenceClassification(
        tr.XLMConfig(
            vocab_size=VOCAB, emb_dim=WIDTH, n_layers=LAYERS, n_heads=2, dropout=0.0, num_labels=3
        )
    ),
    "distilbert": lambda: tr.DistilBertForSequenceClassification(
        tr.DistilBertConfig(
            vocab_size=VOCAB,
            dim=WIDTH,
            hidden_dim=NEURONS,
            n_layers=LAYERS,
            n_heads=2,
            max_position_embeddings=40,
            dropout=0.0,
            attention_dropout=0.0,
            seq_classif_dropout=0.0,
            num_labels=3,
        )
    ),
    "deberta-v2": _encoder(
        tr.DebertaV2Config,
        tr.DebertaV2ForSequenceClassification,
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["p2c", "c2p"],
        max_relative_positions=-1,
    ),
    "modernbert": _encoder(
        tr.ModernBertConfig,
        tr.ModernBertForSequenceClassification,
        pad_token_id=0,
        mlp_bias=True,
        local_attention=8,
    ),
}
DECODERS: dict[str, Callable[[], Any]] = {
    "gpt2": tiny.gpt2,
    "llama": tiny.llama,
    "mistral": _decoder(tr.MistralConfig, tr.MistralForCausalLM, head_dim=8),
    "qwen2": _decoder(tr.Qwen2Config, tr.Qwen2ForCausalLM),
    "qwen3": _decoder(tr.Qwen3Config, tr.Qwen3ForCausalLM, head_dim=8),
    "gemma": _decoder(tr.GemmaConfig, tr.GemmaForCausalLM, head_dim=8),
    "gemma2": _decoder(tr.Gemma2Config, tr.Gemma2ForCausalLM, head_dim=8, sliding_window=8),
    "gemma3": _decoder(tr.Gemma3TextConfig, tr.Gemma3ForCausalLM, head_dim=8, sliding_window=8),
    "olmo2": _decoder(tr.Olmo2Config, tr.Olmo2ForCausalLM),
    "phi": _decoder(tr.PhiConfig, tr.PhiForCausalLM),
    "phi3": _decoder(tr.Phi3Config, tr.Phi3ForCausalLM),
    "gpt-neox": _decoder(tr.GPTNeoXConfig, tr.GPTNeoXForCausalLM),
    "starcoder2": _decoder(tr.Starcoder2Config, tr.Starcoder2ForCausalLM),
    "falcon": lambda: tr.FalconForCausalLM(
        tr.FalconConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            ffn_hidden_size=NEURONS,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
    "bloom": lambda: tr.BloomForCausalLM(
        tr.BloomConfig(vocab_size=VOCAB, hidden_size=WIDTH, n_layer=LAYERS, n_head=2)
    ),
    "gpt-j": lambda: tr.GPTJForCausalLM(
        tr.GPTJConfig(
            vocab_size=VOCAB,
            n_positions=64,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=2,
            n_inner=NEURONS,
            rotary_dim=4,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
    "opt": lambda: tr.OPTForCausalLM(
        tr.OPTConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            word_embed_proj_dim=WIDTH,
            ffn_dim=NEURONS,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            max_position_embeddings=64,
            dropout=0.0,
            attention_dropout=0.0,
            pad_token_id=0,
        )
    ),
}
SEQ2SEQ: dict[str, Callable[[], Any]] = {
    "t5": lambda: _t5("relu"),
    "t5-gated": lambda: _t5("gated-gelu"),
    "bart": lambda: tr.BartForConditionalGeneration(tr.BartConfig(**_SEQ2SEQ)),
    "marian": lambda: tr.MarianMTModel(tr.MarianConfig(**_SEQ2SEQ)),
}
IMAGES: dict[str, Callable[[], Any]] = {
    "vit": tiny.vit,
    "deit": _image(tr.DeiTConfig, tr.DeiTForImageClassification),
    "dinov2": _image(tr.Dinov2Config, tr.Dinov2ForImageClassification, mlp_ratio=2),
    "dinov2-swiglu": _image(
        tr.Dinov2Config, tr.Dinov2ForImageClassification, use_swiglu_ffn=True, mlp_ratio=3
    ),
    "vit-mae": _vitmae,
    "timm-mlp": lambda: _with(TimmMlp),
    "structure": lambda: _with(lambda: OwnFFN(gated=False)),
    "structure-gated": lambda: _with(lambda: OwnFFN(gated=True)),
}
SOUNDS: dict[str, Callable[[], Any]] = {
    "wav2vec2": lambda: tr.Wav2Vec2ForSequenceClassification(tr.Wav2Vec2Config(**_AUDIO)),
    "hubert": lambda: tr.HubertForSequenceClassification(tr.HubertConfig(**_AUDIO)),
}
PAIRS: dict[str, Callable[[], Any]] = {"clip": _clip, "siglip": _siglip}
OTHERS: dict[str, Callable[[], Any]] = {"whisper": _whisper, "ast": _ast, **SOUNDS, **PAIRS}
FAMILIES = {**TEXT_ENCODERS, **DECODERS, **SEQ2SEQ, **IMAGES, **OTHERS}
# MoE models of transformers, which have 4 experts here: configuration, class, how that is said.
MOE: dict[str, tuple[Any, Any, dict[str, int]]] = {
    "mixtral": (tr.MixtralConfig, tr.MixtralForCausalLM, {"num_local_experts": 4}),
    "olmoe": (tr.OlmoeConfig, tr.OlmoeForCausalLM, {"num_experts": 4}),
    "qwen2_moe": (
        tr.Qwen2MoeConfig,
        tr.Qwen2MoeForCausalLM,
        {
            "num_experts": 4,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 12,
            "decoder_sparse_step": 1,
        },
    ),
}


def _moe(family: str, vocab: int = VOCAB) -> Callable[[], Any]:
    config, model, experts = MOE[family]
    return _decoder(config, model, vocab_size=vocab, num_experts_per_tok=2, **experts)


# Families without an FFN that can be converted.
REFUSED: dict[str, Callable[[], Any]] = {
    "mixtral": _moe("mixtral"),
    "olmoe": _moe("olmoe"),
    "gpt-oss": _decoder(tr.GptOssConfig, tr.GptOssForCausalLM, num_local_experts=4, head_dim=8),
    "mpt": lambda: tr.MptForCausalLM(
        tr.MptConfig(vocab_size=VOCAB, d_model=WIDTH, n_heads=2, n_layers=LAYERS, expansion_ratio=2)
    ),
    "esm": _encoder(tr.EsmConfig, tr.EsmForSequenceClassification, pad_token_id=0),
    "albert": _encoder(tr.AlbertConfig, tr.AlbertForSequenceClassification),
    "mamba": lambda: tr.MambaForCausalLM(
        tr.MambaConfig(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, state_size=4)
    ),
}
GENERATIVE = [*DECODERS, *SEQ2SEQ, "whisper"]


def build(family: str, seed: int = 0, scale: float = 8.0) -> Any:
    """As `tests.tiny.build`, for every family."""
    return tiny.initialise({**FAMILIES, **REFUSED}[family], seed, scale)


def moe(family: str, vocab: int = VOCAB) -> Any:
    """A tiny MoE model of transformers with 4 experts, 2 per token."""
    return tiny.initialise(_moe(family, vocab))


def inputs(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Inputs:
    """Arguments of the model's forward: two examples, one of them padded where texts are."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    ids = ids.where(mask == 1, 0)
    pixels = torch.randn(2, 3, 8, 8, generator=generator).to(dtype)
    if family == "vit-mae":  # which patches are hidden
        return {"pixel_values": pixels, "noise": torch.rand(2, 16, generator=generator).to(dtype)}
    if family in IMAGES:
        return {"pixel_values": pixels}
    if family in SOUNDS:
        return {"input_values": torch.randn(2, 200, generator=generator).to(dtype)}
    if family == "whisper":
        features = torch.randn(2, 8, 32, generator=generator).to(dtype)
        return {"input_features": features, "decoder_input_ids": ids}
    if family == "ast":
        return {"input_values": torch.randn(2, 8, 8, generator=generator).to(dtype)}
    text = {"input_ids": ids, "attention_mask": mask}
    if family in PAIRS:
        return {**text, "pixel_values": pixels}
    if family in SEQ2SEQ:
        return {**text, "decoder_input_ids": ids[:, :7]}
    return text


def outputs(model: Any, batch: Inputs) -> Tensor:
    """The logits, or what stands for them."""
    out = model(**batch)
    logits: Tensor = out.logits_per_image if hasattr(out, "logits_per_image") else out.logits
    return logits


def ffn_count(family: str) -> int:
    """FFNs in the tiny model."""
    if family == "siglip":  # one more in the head of its vision tower
        return 2 * LAYERS + 1
    two = family in SEQ2SEQ or family in ("whisper", "clip", "vit-mae")
    return LAYERS * (2 if two else 1)
