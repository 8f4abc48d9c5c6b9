"""Text encoders and transformer of the base model, trained together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from shapes_models.stage import Stage
from shapes_models.text import TEXT_WIDTH, text_config, tokenize
from shapes_models.vae import training_captions
from t2irl.shapes.captions import sample_captions
from t2irl.shapes.verify import verify

SD3_STEPS, SD3_BATCH = 3_300, 128
GUIDED_FROM, GUIDED_SCALE = 2_000, 2.5  # from this step on the model learns to draw as if guided by this scale
PLAIN_STEPS, PLAIN_LR = 1_200, 0.7  # the last part: steps, and peak learning rate as a share of the first part's
PLAIN_T_MEAN = 0.5  # mean of the logit of its noise levels
SHIFT = 1.5  # of the sampling schedule
T5_ZEROS = 256  # what StableDiffusion3Pipeline appends by default when there is no T5 encoder


@contextmanager
def last_key_counts_as(copies: int) -> Iterator[None]:
    """Make the last key of every attention count as `copies` equal keys (softmax weight times n = logit + log n).

    Without a T5 encoder the pipeline appends 256 zero vectors to the text. They stay identical through all layers, so
    one of them with this bias gives the same result as 256, at a fraction of the cost.
    """
    plain = F.scaled_dot_product_attention

    def biased(query: Tensor, key: Tensor, value: Tensor, **kwargs: object) -> Tensor:
        bias = query.new_zeros(1, 1, 1, key.shape[-2])
        bias[..., -1] = math.log(copies)
        return plain(query, key, value, attn_mask=bias.expand(1, 1, query.shape[-2], -1))

    F.scaled_dot_product_attention = biased
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


class Policy(nn.Module):
    """The text encoders and the transformer, fed exactly as StableDiffusion3Pipeline feeds them."""

    null_ids: Tensor
    """(1, 16) token ids of the empty text."""

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.text_encoder = CLIPTextModelWithProjection(CLIPTextConfig(**text_config(tokenizer)))
        self.text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(**text_config(tokenizer)))
        self.transformer = SD3Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=32,
            num_attention_heads=4, caption_projection_dim=128, joint_attention_dim=2 * TEXT_WIDTH,
            pooled_projection_dim=2 * TEXT_WIDTH, pos_embed_max_size=8, qk_norm="rms_norm",
        )  # fmt: skip
        self.register_buffer("null_ids", tokenize(tokenizer, [""]), persistent=False)

    def encode(self, ids: Tensor, extra: int = 0) -> tuple[Tensor, Tensor]:
        """Token ids -> (B, 16 + extra, 128) embeddings and (B, 128) pooled ones; `extra` zero vectors follow."""
        outputs = [e(ids, output_hidden_states=True) for e in (self.text_encoder, self.text_encoder_2)]
        tokens = torch.cat([o.hidden_states[-2] for o in outputs], -1)
        return F.pad(tokens, (0, 0, 0, extra)), torch.cat([o.text_embeds for o in outputs], -1)

    def velocity(self, latents: Tensor, t: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        """Velocity at noise level `t` in [0, 1]."""
        return self.transformer(latents, text[0], text[1], t * 1000).sample


@torch.no_grad()
def sample(
    policy: Policy,
    vae: AutoencoderKL,
    ids: Tensor,
    seed: int,
    guidance: float = 1.0,
    steps: int = 10,
    shift: float = 1.0,
    extra: int = 0,
) -> Tensor:
    """Euler samples, (B, 3, 64, 64) in [0, 1]."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    x = torch.randn(len(ids), 4, 16, 16, generator=torch.Generator().manual_seed(seed))
    text, null = policy.encode(ids, extra), policy.encode(policy.null_ids.expand(len(ids), -1), extra)
    for t, t_next in zip(scheduler.sigmas[:-1], scheduler.sigmas[1:], strict=True):
        v = policy.velocity(x, t.expand(len(x)), text)
        if guidance != 1:
            v_null = policy.velocity(x, t.expand(len(x)), null)
            v = v_null + guidance * (v - v_null)
        x = x + (t_next - t) * v
    x = x / vae.config.scaling_factor + vae.config.shift_factor
    return torch.cat([vae.decode(part).sample for part in x.split(64)]).div(2).add(0.5).clamp(0, 1)


def heldout_score(
    policy: Policy, vae: AutoencoderKL, tokenizer: CLIPTokenizer, n: int, **kwargs: Any
) -> dict[str, float]:
    """Mean gold scores of `n` samples on held-out captions."""
    texts = [c.text for c in sample_captions(n, np.random.default_rng(11), heldout=True)]
    pictures = torch.cat(
        [sample(policy, vae, tokenize(tokenizer, texts[i : i + 128]), seed=i, **kwargs) for i in range(0, n, 128)]
    )
    return {name: values.mean().item() for name, values in verify(pictures, texts).items()}


def flow_matching(
    policy: Policy, x0: Tensor, ids: Tensor, step: int, generator: torch.Generator, guided: bool, t_mean: float
) -> Tensor:
    """Loss of a step on latents (B, 4, 16, 16) and the token ids (B, 16) of their captions, a tenth of which are dropped.

    `guided`: towards model guidance by GUIDED_SCALE; `t_mean`: mean of the logit of the noise levels.
    """
    noise = torch.randn(x0.shape, generator=generator)
    t = torch.sigmoid(torch.randn(len(x0), generator=generator) + t_mean)
    dropped = torch.rand(len(x0), generator=generator) < 0.1
    tokens = torch.where(dropped[:, None], policy.null_ids, ids)
    x_t = torch.lerp(x0, noise, t.view(-1, 1, 1, 1))
    target = noise - x0
    if step % 4 == 3:  # as a plain pipeline call sees it
        with last_key_counts_as(T5_ZEROS):
            v = policy.velocity(x_t, t, policy.encode(tokens, extra=1))
    else:
        v = policy.velocity(x_t, t, policy.encode(tokens))
    if guided:
        with torch.no_grad():
            v_null = policy.velocity(x_t, t, policy.encode(policy.null_ids.expand(len(x0), -1)))
            target = target + (1 - 1 / GUIDED_SCALE) * (v - v_null) * (~dropped).view(-1, 1, 1, 1)
    return F.mse_loss(v, target)


def progress(policy: Policy, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> str:
    """Gold scores at three guidance scales, for the log."""
    report = ""
    for guidance in (1.0, 2.0, 3.0):
        scores = heldout_score(policy, vae, tokenizer, 128, guidance=guidance, shift=SHIFT)
        report += f"guidance {guidance}: " + " ".join(f"{k} {v:.3f}" for k, v in scores.items()) + "; "
    return report


def build_sd3(work: Path, latents: Tensor, vae: AutoencoderKL, tokenizer: CLIPTokenizer, seed: int) -> Policy:
    """Flow matching with text dropout, in three parts.

    Plain flow matching first. Then model guidance (arXiv 2502.12154), which teaches drawing much faster: the target
    u + w (v(x, c) - v(x, null)) has its fixed point at guidance 1 / (1 - w). Last, plain flow matching again, with more
    of the noise levels at which the composition is decided: the guidance is unlearned, the drawing stays, and what is left
    is a base model that knows more than it shows without guidance.
    """
    torch.manual_seed(seed)
    policy = Policy(tokenizer)
    ids = tokenize(tokenizer, [c.text for c in training_captions(seed)])

    def loss_at(step: int, generator: torch.Generator, guided: bool, t_mean: float) -> Tensor:
        chosen = torch.randint(len(latents), (SD3_BATCH,), generator=generator)
        return flow_matching(policy, latents[chosen].float(), ids[chosen], step, generator, guided, t_mean)

    def check() -> str:
        return progress(policy, vae, tokenizer)

    decay = [(0, 1.0), (GUIDED_FROM, 0.545), (SD3_STEPS, 0.0)]
    Stage("sd3", work, decay, {"policy": policy}, optimizers(policy, 1.0)).run(
        lambda step, generator: loss_at(step, generator, step >= GUIDED_FROM, 0.0), seed + 2, check
    )
    decay = [(0, 1.0), (PLAIN_STEPS // 3, 1.0), (PLAIN_STEPS, 0.0)]
    Stage("sd3_plain", work, decay, {"policy": policy}, optimizers(policy, PLAIN_LR)).run(
        lambda step, generator: loss_at(step, generator, False, PLAIN_T_MEAN), seed + 4, check
    )
    return policy.eval().requires_grad_(False)


def optimizers(policy: Policy, scale: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the transformer's blocks, AdamW for everything else; `scale` of the peak learning rates."""
    blocks = policy.transformer.transformer_blocks
    matrices = [p for n, p in blocks.named_parameters() if p.ndim == 2 and "norm" not in n]
    chosen = {id(p) for p in matrices}
    others = [p for p in policy.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=3e-3 * scale, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=2e-3 * scale, betas=(0.9, 0.98), weight_decay=0.0),
    ]
