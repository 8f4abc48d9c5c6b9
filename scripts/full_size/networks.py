"""The networks of published models at their full size, and folders of them: configs and headers of weights, no weights."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
)

NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "bool": "BOOL"}


def clip_l() -> nn.Module:
    """CLIP ViT-L/14's text encoder."""
    return CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))


def clip_g() -> nn.Module:
    """CLIP ViT-bigG/14's text encoder."""
    size = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32}
    return CLIPTextModelWithProjection(CLIPTextConfig(**size, projection_dim=1280))


def t5_xxl() -> nn.Module:
    """T5 v1.1 XXL's encoder."""
    size = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    return T5EncoderModel(T5Config(**size, feed_forward_proj="gated-gelu"))


def qwen_vl() -> nn.Module:
    """Qwen2.5-VL 7B."""
    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    text |= {"num_key_value_heads": 4, "vocab_size": 152064}
    vision = {"hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def decoder(channels: int, **settings: Any) -> AutoencoderKL:
    """The four resolutions that all of these have."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=channels,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, **settings,
    )  # fmt: skip


def sd35_medium() -> dict[str, nn.Module]:
    """StableDiffusion3Pipeline."""
    transformer = SD3Transformer2DModel(
        sample_size=128, num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384,
        qk_norm="rms_norm", dual_attention_layers=tuple(range(13)),
    )  # fmt: skip
    clips = {"text_encoder": clip_l(), "text_encoder_2": clip_g(), "text_encoder_3": t5_xxl()}
    return {"transformer": transformer, "vae": decoder(16), **clips}


def flux1_dev() -> dict[str, nn.Module]:
    """FluxPipeline."""
    transformer = FluxTransformer2DModel(guidance_embeds=True)
    return {"transformer": transformer, "vae": decoder(16), "text_encoder": clip_l(), "text_encoder_2": t5_xxl()}


def qwen_image() -> dict[str, nn.Module]:
    """QwenImagePipeline."""
    return {"transformer": QwenImageTransformer2DModel(), "vae": AutoencoderKLQwenImage(), "text_encoder": qwen_vl()}


def sdxl() -> dict[str, nn.Module]:
    """StableDiffusionXLPipeline."""
    unet = UNet2DConditionModel(
        sample_size=128, block_out_channels=(320, 640, 1280), cross_attention_dim=2048, attention_head_dim=(5, 10, 20),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), use_linear_projection=True,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2, 10),
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    )  # fmt: skip
    return {"unet": unet, "vae": decoder(4), "text_encoder": clip_l(), "text_encoder_2": clip_g()}


def scheduler(name: str) -> Any:
    """The published schedule."""
    if name == "sdxl":
        return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    settings: dict[str, dict[str, Any]] = {
        "flux1_dev": {"shift": 3.0, "use_dynamic_shifting": True, "max_shift": 1.15},
        "qwen_image": {
            "use_dynamic_shifting": True,
            "max_image_seq_len": 8192,
            "max_shift": 0.9,
            "shift_terminal": 0.02,
        },
        "sd35_medium": {"shift": 3.0},
    }
    return FlowMatchEulerDiscreteScheduler(**settings[name])


FULL: dict[str, tuple[str, Callable[[], dict[str, nn.Module]]]] = {
    "flux1_dev": ("FluxPipeline", flux1_dev),
    "qwen_image": ("QwenImagePipeline", qwen_image),
    "sd35_medium": ("StableDiffusion3Pipeline", sd35_medium),
    "sdxl": ("StableDiffusionXLPipeline", sdxl),
}
"""Folder under configs/ -> the class of its pipeline, and its networks."""


def write_folder(folder: Path, name: str) -> Path:
    """Everything of a pipeline folder that `check` reads, and the scheduler."""
    pipeline, networks = FULL[name]
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        parts = networks()
    index: dict[str, Any] = {"_class_name": pipeline}
    for part, network in parts.items():
        target = folder / part
        target.mkdir(parents=True, exist_ok=True)
        config: Any = network.config
        settings = config.to_dict() if isinstance(network, PreTrainedModel) else dict(config)
        (target / "config.json").write_text(json.dumps(settings, default=str), encoding="utf-8")
        header = {
            key: {"dtype": NAMES[str(t.dtype).removeprefix("torch.")], "shape": list(t.shape), "data_offsets": [0, 0]}
            for key, t in network.state_dict().items()
        }
        text = json.dumps(header).encode()
        (target / "diffusion_pytorch_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
        library = "transformers" if isinstance(network, PreTrainedModel) else "diffusers"
        index[part] = [library, type(network).__name__]
    index["scheduler"] = ["diffusers", type(scheduler(name)).__name__]
    scheduler(name).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder
