"""Small random weights in the published formats of reward models: the same names, the same rules of shapes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPModel

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,"


def head_weights(width: int, prefix: str = "") -> dict[str, Tensor]:
    """LAION's predictor and ImageReward's head: layers 0, 2, 4, 6 and 7 of a sequence with dropout in between."""
    generator, sizes = torch.Generator().manual_seed(4), (width, 1024, 128, 64, 16, 1)
    found = {}
    for place, wide, narrow in zip((0, 2, 4, 6, 7), sizes, sizes[1:], strict=False):
        found[f"{prefix}layers.{place}.weight"] = torch.randn(narrow, wide, generator=generator) / wide**0.5
        found[f"{prefix}layers.{place}.bias"] = 0.1 * torch.randn(narrow, generator=generator)
    return found


def as_open_clip(model: CLIPModel) -> dict[str, Tensor]:
    """What open_clip would save of a CLIP with one attention head of 64 in each tower."""
    there: dict[str, Tensor] = {"logit_scale": model.logit_scale.detach()}
    for prefix, tower in (("visual.", model.vision_model), ("", model.text_model)):
        for number, layer in enumerate(tower.encoder.layers):
            block, attention = f"{prefix}transformer.resblocks.{number}.", layer.self_attn
            for kind in ("weight", "bias"):
                parts = [getattr(getattr(attention, f"{p}_proj"), kind).detach() for p in "qkv"]
                there[f"{block}attn.in_proj_{kind}"] = torch.cat(parts)
                for name, module in (
                    ("attn.out_proj", attention.out_proj), ("ln_1", layer.layer_norm1), ("ln_2", layer.layer_norm2),
                    ("mlp.c_fc", layer.mlp.fc1), ("mlp.c_proj", layer.mlp.fc2),
                ):  # fmt: skip
                    there[f"{block}{name}.{kind}"] = getattr(module, kind).detach()
    vision, text = model.vision_model, model.text_model
    norms = {
        "visual.ln_pre": vision.pre_layrnorm,
        "visual.ln_post": vision.post_layernorm,
        "ln_final": text.final_layer_norm,
    }
    there |= {
        f"{name}.{kind}": getattr(norm, kind).detach() for name, norm in norms.items() for kind in ("weight", "bias")
    }
    there |= {
        "visual.class_embedding": vision.embeddings.class_embedding.detach(),
        "visual.positional_embedding": vision.embeddings.position_embedding.weight.detach(),
        "visual.conv1.weight": vision.embeddings.patch_embedding.weight.detach(),
        "visual.proj": model.visual_projection.weight.detach().T,
        "positional_embedding": text.embeddings.position_embedding.weight.detach(),
        "token_embedding.weight": text.embeddings.token_embedding.weight.detach(),
        "text_projection": model.text_projection.weight.detach().T,
    }  # fmt: skip
    return {name: value.clone().contiguous() for name, value in there.items()}


def wide_clip(clip_folder: Path) -> CLIPModel:
    """A CLIP for the tokenizer of a folder, with attention heads of 64 as published ones have."""
    config = CLIPModel.config_class.from_pretrained(clip_folder)
    for part in (config.vision_config, config.text_config):
        part.hidden_size, part.intermediate_size, part.num_attention_heads, part.hidden_act = 64, 128, 1, "gelu"
    torch.manual_seed(3)
    model = CLIPModel(config)
    for parameter in model.parameters():  # biases and scales away from 0 and 1
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def write_hps(folder: Path, clip_folder: Path) -> Path:
    """`HPS_v2.1_compressed.pt` in half precision, and a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(clip_folder / name, folder / name)
    weights = {name: value.half() for name, value in as_open_clip(wide_clip(clip_folder)).items()}
    torch.save({"state_dict": weights}, folder / "HPS_v2.1_compressed.pt")
    return folder


def write_image_reward(folder: Path) -> Path:
    """`ImageReward.pt` with BLIP's own names, `med_config.json` and `vocab.txt`."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS)]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    )
    med = {
        "architectures": ["BertModel"], "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
        "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 64, "layer_norm_eps": 1e-12,
        "max_position_embeddings": 64, "model_type": "bert", "num_attention_heads": 2, "num_hidden_layers": 2, "pad_token_id": 0,
        "type_vocab_size": 2, "vocab_size": len(words), "encoder_width": 64, "add_cross_attention": True,
    }  # fmt: skip
    (folder / "med_config.json").write_text(json.dumps(med))
    generator = torch.Generator().manual_seed(6)
    shapes: dict[str, tuple[int, ...]] = {
        "visual_encoder.cls_token": (1, 1, 64), "visual_encoder.pos_embed": (1, 17, 64),
        "visual_encoder.patch_embed.proj.weight": (64, 3, 8, 8), "visual_encoder.patch_embed.proj.bias": (64,),
        "text_encoder.embeddings.word_embeddings.weight": (len(words), 32),
        "text_encoder.embeddings.position_embeddings.weight": (64, 32),
    }  # fmt: skip
    norms = ["visual_encoder.norm", "text_encoder.embeddings.LayerNorm"]
    linear: dict[str, tuple[int, int]] = {}
    for n in range(2):
        block, layer = f"visual_encoder.blocks.{n}", f"text_encoder.encoder.layer.{n}"
        norms += [f"{block}.norm1", f"{block}.norm2", f"{layer}.output.LayerNorm"]
        linear |= {f"{block}.attn.qkv": (192, 64), f"{block}.attn.proj": (64, 64), f"{block}.mlp.fc1": (128, 64)}
        linear |= {
            f"{block}.mlp.fc2": (64, 128),
            f"{layer}.intermediate.dense": (64, 32),
            f"{layer}.output.dense": (32, 64),
        }
        for kind, source in (("attention", 32), ("crossattention", 64)):
            norms.append(f"{layer}.{kind}.output.LayerNorm")
            linear |= {f"{layer}.{kind}.self.query": (32, 32), f"{layer}.{kind}.output.dense": (32, 32)}
            linear |= {f"{layer}.{kind}.self.{part}": (32, source) for part in ("key", "value")}
    for name in norms:
        shapes |= {
            f"{name}.weight": (64 if "visual" in name else 32,),
            f"{name}.bias": (64 if "visual" in name else 32,),
        }
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    weights = {f"blip.{name}": 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    weights |= {f"blip.{name}.weight": 1 + weights[f"blip.{name}.weight"] for name in norms}
    weights["blip.text_encoder.embeddings.position_ids"] = torch.arange(64)[None]
    weights |= {"blip.vision_proj.weight": torch.zeros(8, 64), "blip.text_proj.weight": torch.zeros(8, 32)}
    torch.save(weights | head_weights(32, "mlp."), folder / "ImageReward.pt")
    return folder
