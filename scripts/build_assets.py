"""Train the models of the shapes world from scratch and write them to `assets/`.

    python scripts/build_assets.py        # about 45 minutes on two quiet cores

Stages: tokenizer, vae, sd3 (text encoders and transformer together), clip, card. Each training stage saves itself
every few hundred steps under `--work` and continues from there after an interruption; a finished stage is skipped.
Everything is drawn from `--seed`.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer,
)  # fmt: skip

from t2irl.shapes.captions import Caption, sample_captions
from t2irl.shapes.render import render, sample_scene
from t2irl.shapes.verify import verify
from t2irl.utils.memory import keep_heap

TEXT_TOKENS = 16  # the longest caption has 12 words
TEXT_WIDTH = 64
POOLED = 2 * TEXT_WIDTH
PICTURES = 60_000
VAE_STEPS, VAE_BATCH = 1_000, 64
SD3_STEPS, SD3_BATCH = 3_300, 128
CLIP_STEPS, CLIP_BATCH, CLIP_PICTURES = 500, 128, 2_000
GUIDED_FROM, GUIDED_SCALE = 2_000, 2.5  # from this step on the model learns to draw as if guided by this scale
SHIFT = 1.5  # of the sampling schedule
T5_ZEROS = 256  # what StableDiffusion3Pipeline appends by default when there is no T5 encoder


# ---------------------------------------------------------------------------------------------------------- plumbing
class Stage:
    """One training stage: linear warm-up and decay, periodic saving, exact continuation, a log line now and then."""

    def __init__(self, name: str, work: Path, decay: list[tuple[int, float]], modules: dict[str, nn.Module], optimizers: list[torch.optim.Optimizer]):
        """`decay`: (step, share of the peak learning rate), joined by straight lines; the last step ends the stage."""
        steps = decay[-1][0]
        self.decay = tuple(zip(*decay, strict=True))
        self.name, self.file, self.steps = name, work / f"{name}.pt", steps
        self.modules, self.optimizers, self.step = modules, optimizers, 0
        self.peaks = [[g["lr"] for g in o.param_groups] for o in optimizers]
        self.started, self.before = time.time(), 0.0
        if self.file.exists():
            state = torch.load(self.file, weights_only=True)
            self.before = state.get("seconds", 0.0)
            self.step = state["step"]
            for name_, module in modules.items():
                module.load_state_dict(state["modules"][name_])
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)

    def run(self, loss_at: Callable[[int, torch.Generator], Tensor], seed: int, check: Callable[[], str] | None = None) -> None:
        """Minimise `loss_at(step, generator)`; the generator depends on the step alone, so resuming repeats nothing."""
        losses: list[float] = []
        while self.step < self.steps:
            scale = min((self.step + 1) / 150, 1.0) * float(np.interp(self.step, *self.decay))
            for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
                for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                    group["lr"] = peak * scale
            loss = loss_at(self.step, torch.Generator().manual_seed(seed * 1_000_003 + self.step))
            loss.backward()
            for module in self.modules.values():
                nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            self.step += 1
            if self.step % 100 == 0:
                done = time.time() - self.started
                print(f"{self.name} {self.step}/{self.steps} loss {np.mean(losses[-100:]):.4f} {done:.0f} s", flush=True)
            if self.step % 400 == 0 or self.step == self.steps:
                self.save()
                if check is not None:
                    print(f"  {check()}", flush=True)

    def save(self) -> None:
        state = {
            "step": self.step,
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizers": [o.state_dict() for o in self.optimizers],
            "seconds": self.before + time.time() - self.started,
        }
        torch.save(state, self.file.with_suffix(".tmp"))
        self.file.with_suffix(".tmp").replace(self.file)


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


def draw(captions: list[Caption], seed: int) -> Tensor:
    """Render one picture a caption: (N, 3, 64, 64) uint8."""
    rng = np.random.default_rng(seed)
    pictures = np.stack([render(sample_scene(caption, rng)) for caption in captions])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def to_float(pictures: Tensor) -> Tensor:
    """uint8 -> float in [-1, 1], the VAE's range."""
    return pictures.float() / 127.5 - 1


# ------------------------------------------------------------------------------------------------------------ stages
def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer whose vocabulary is the 256 bytes and every word of the grammar."""
    rng = np.random.default_rng(0)
    texts = sorted({c.text for c in sample_captions(4_000, rng)})
    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=2_000, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False)
    )
    merges = [tuple(m) if not isinstance(m, str) else tuple(m.split(" ")) for m in json.loads(bpe.to_str())["model"]["merges"]]
    symbols = alphabet + [a + "</w>" for a in alphabet]
    vocab = {s: i for i, s in enumerate(dict.fromkeys([*symbols, *("".join(m) for m in merges)]))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(str(folder), model_max_length=TEXT_TOKENS, pad_token="<|endoftext|>")
    longest = max(len(tokenizer(t).input_ids) for t in texts)
    assert longest <= TEXT_TOKENS, f"a caption takes {longest} tokens"
    return tokenizer


def text_config(tokenizer: CLIPTokenizer) -> dict[str, int]:
    """Settings that every text encoder of the shapes world shares."""
    return dict(
        vocab_size=len(tokenizer), hidden_size=TEXT_WIDTH, intermediate_size=2 * TEXT_WIDTH, projection_dim=TEXT_WIDTH,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=TEXT_TOKENS,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """(N, 16) token ids, padded as the pipeline does."""
    return tokenizer(texts, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt").input_ids


def build_vae(work: Path, pictures: Tensor, seed: int) -> AutoencoderKL:
    """An autoencoder, 64 px -> 4 x 16 x 16, decoding well even from slightly wrong latents."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64), layers_per_block=1, latent_channels=4, norm_num_groups=8, sample_size=64,
        use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False,
    )  # fmt: skip
    stage = Stage("vae", work, [(0, 1.0), (VAE_STEPS, 0.0)], {"vae": vae}, [torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)])
    spread = 0.25

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        x = to_float(pictures[torch.randint(len(pictures), (VAE_BATCH,), generator=generator)])
        with torch.autocast("cpu", torch.bfloat16):
            moments = vae.encoder(x).float()
            mean, log_variance = moments.chunk(2, 1)
            noise = torch.randn(mean.shape, generator=generator)
            decoded = vae.decoder(mean + spread * noise).float()
        error = decoded - x
        prior = 5e-4 * mean.square().mean() + 1e-3 * (log_variance - 2 * math.log(spread)).square().mean()
        return error.abs().mean() + error.square().mean() + prior

    def check() -> str:
        x = pictures[:128]
        with torch.no_grad():
            back = vae.decode(vae.encode(to_float(x)).latent_dist.mode()).sample
        scores = verify(back / 2 + 0.5, [c.text for c in training_captions(seed)[:128]])
        return "vae reconstruction " + " ".join(f"{k} {v.mean():.3f}" for k, v in scores.items())

    stage.run(loss_at, seed + 1, check)
    return vae.eval().requires_grad_(False)


def training_captions(seed: int) -> list[Caption]:
    """The captions of the rendered training set, none of them held out."""
    return sample_captions(PICTURES, np.random.default_rng(seed))


@torch.no_grad()
def encode_all(work: Path, vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Latents of the whole training set, standardised; sets the VAE's scaling and shift. (N, 4, 16, 16) float16."""
    file = work / "latents.pt"
    if not file.exists():
        with torch.autocast("cpu", torch.bfloat16):
            chunks = [vae.encode(to_float(p)).latent_dist.mode().float() for p in pictures.split(256)]
        torch.save(torch.cat(chunks), file)
    latents = torch.load(file)
    shift, scale = latents.mean().item(), 1 / latents.std().item()
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    return ((latents - shift) * scale).half()


class Policy(nn.Module):
    """The text encoders and the transformer, fed exactly as StableDiffusion3Pipeline feeds them."""

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.text_encoder = CLIPTextModelWithProjection(CLIPTextConfig(**text_config(tokenizer)))
        self.text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(**text_config(tokenizer)))
        self.transformer = SD3Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=32,
            num_attention_heads=4, caption_projection_dim=128, joint_attention_dim=2 * TEXT_WIDTH,
            pooled_projection_dim=POOLED, pos_embed_max_size=8, qk_norm="rms_norm",
        )  # fmt: skip

    def encode(self, ids: Tensor, extra: int = 0) -> tuple[Tensor, Tensor]:
        """Token ids -> (B, 16 + extra, 128) embeddings and (B, 128) pooled ones; `extra` zero vectors follow."""
        outputs = [e(ids, output_hidden_states=True) for e in (self.text_encoder, self.text_encoder_2)]
        tokens = torch.cat([o.hidden_states[-2] for o in outputs], -1)
        return F.pad(tokens, (0, 0, 0, extra)), torch.cat([o.text_embeds for o in outputs], -1)

    def velocity(self, latents: Tensor, t: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        """Velocity at noise level `t` in [0, 1]."""
        return self.transformer(latents, text[0], text[1], t * 1000).sample


@torch.no_grad()
def sample(policy: Policy, vae: AutoencoderKL, ids: Tensor, seed: int, guidance: float = 1.0, steps: int = 10, shift: float = 1.0, extra: int = 0) -> Tensor:
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


def heldout_score(policy: Policy, vae: AutoencoderKL, tokenizer: CLIPTokenizer, n: int, **kwargs: float) -> dict[str, float]:
    """Mean gold scores of `n` samples on held-out captions."""
    texts = [c.text for c in sample_captions(n, np.random.default_rng(11), heldout=True)]
    pictures = torch.cat([sample(policy, vae, tokenize(tokenizer, texts[i : i + 128]), seed=i, **kwargs) for i in range(0, n, 128)])
    return {name: values.mean().item() for name, values in verify(pictures, texts).items()}


def build_sd3(work: Path, latents: Tensor, vae: AutoencoderKL, tokenizer: CLIPTokenizer, seed: int) -> Policy:
    """Flow matching with text dropout; in the last part with model guidance (arXiv 2502.12154), so that the model follows
    its text without guidance. The target u + w (v(x, c) - v(x, null)) has its fixed point at guidance 1 / (1 - w)."""
    torch.manual_seed(seed)
    policy = Policy(tokenizer)
    policy.null_ids = tokenize(tokenizer, [""])
    ids = tokenize(tokenizer, [c.text for c in training_captions(seed)])
    blocks = policy.transformer.transformer_blocks
    matrices = [p for n, p in blocks.named_parameters() if p.ndim == 2 and "norm" not in n]
    chosen = {id(p) for p in matrices}
    others = [p for p in policy.parameters() if id(p) not in chosen]
    optimizers = [
        torch.optim.Muon(matrices, lr=3e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    decay = [(0, 1.0), (GUIDED_FROM, 0.545), (SD3_STEPS, 0.0)]
    stage = Stage("sd3", work, decay, {"policy": policy}, optimizers)

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(latents), (SD3_BATCH,), generator=generator)
        x0, noise = latents[chosen].float(), torch.randn(SD3_BATCH, 4, 16, 16, generator=generator)
        t = torch.sigmoid(torch.randn(SD3_BATCH, generator=generator))
        dropped = torch.rand(SD3_BATCH, generator=generator) < 0.1
        tokens = torch.where(dropped[:, None], policy.null_ids, ids[chosen])
        x_t = torch.lerp(x0, noise, t.view(-1, 1, 1, 1))
        target = noise - x0
        if step % 4 == 3:  # as a plain pipeline call sees it
            with last_key_counts_as(T5_ZEROS):
                v = policy.velocity(x_t, t, policy.encode(tokens, extra=1))
        else:
            v = policy.velocity(x_t, t, policy.encode(tokens))
        if step >= GUIDED_FROM:
            with torch.no_grad():
                v_null = policy.velocity(x_t, t, policy.encode(policy.null_ids.expand(SD3_BATCH, -1)))
                target = target + (1 - 1 / GUIDED_SCALE) * (v - v_null) * (~dropped).view(-1, 1, 1, 1)
        return F.mse_loss(v, target)

    def check() -> str:
        report = ""
        for guidance in (1.0, 3.0):
            scores = heldout_score(policy, vae, tokenizer, 128, guidance=guidance, shift=1.5)
            report += f"guidance {guidance}: " + " ".join(f"{k} {v:.3f}" for k, v in scores.items()) + "; "
        return report

    stage.run(loss_at, seed + 2, check)
    return policy.eval().requires_grad_(False)


def build_clip(work: Path, tokenizer: CLIPTokenizer, seed: int) -> CLIPModel:
    """A small CLIP that has seen few pictures: an imperfect judge on purpose."""
    torch.manual_seed(seed)
    vision = dict(hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=3, image_size=64, patch_size=8, projection_dim=TEXT_WIDTH)
    clip = CLIPModel(CLIPConfig(text_config=text_config(tokenizer), vision_config=vision, projection_dim=TEXT_WIDTH))
    captions = sample_captions(CLIP_PICTURES, np.random.default_rng(seed + 5))
    pictures, ids = draw(captions, seed + 6), tokenize(tokenizer, [c.text for c in captions])
    stage = Stage("clip", work, [(0, 1.0), (CLIP_STEPS, 0.0)], {"clip": clip}, [torch.optim.AdamW(clip.parameters(), lr=1e-3, weight_decay=0.05)])

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randperm(len(pictures), generator=generator)[:CLIP_BATCH]
        return clip(input_ids=ids[chosen], pixel_values=to_float(pictures[chosen]), return_loss=True).loss

    stage.run(loss_at, seed + 3)
    return clip.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------ output
def seconds_spent(work: Path) -> float:
    """Training time of all stages together."""
    return sum(torch.load(f, weights_only=True)["seconds"] for f in (work / f"{n}.pt" for n in ("vae", "sd3", "clip")))


def write_prompts(folder: Path) -> None:
    """Prompt files: lines drawn as the grammar says (four kinds, equal chance), so short kinds repeat."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, n, heldout in (("shapes_train.txt", 2048, False), ("shapes_heldout.txt", 256, True)):
        captions = sample_captions(n, np.random.default_rng(11 if heldout else 7), heldout=heldout)
        (folder / name).write_text("".join(c.text + "\n" for c in captions))


def null_t5() -> tuple[T5EncoderModel, T5Tokenizer]:
    """A T5 encoder whose output is exactly zero, and a tokenizer for it.

    StableDiffusion3Pipeline.from_pretrained wants a T5 unless told otherwise in the call; this one gives what the pipeline
    would put in its place. Its last normalisation has weight 0.
    """
    tokenizer = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0)], extra_ids=0)
    config = T5Config(vocab_size=8, d_model=2 * TEXT_WIDTH, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    encoder = T5EncoderModel(config)
    nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder, tokenizer


def write_sd3(folder: Path, policy: Policy, vae: AutoencoderKL, tokenizer: CLIPTokenizer, shift: float) -> None:
    """The pipeline folder, weights in float16."""
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    t5, t5_tokenizer = null_t5()
    pipe = StableDiffusion3Pipeline(
        transformer=policy.transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=shift), vae=vae,
        text_encoder=policy.text_encoder, tokenizer=tokenizer, text_encoder_2=policy.text_encoder_2, tokenizer_2=tokenizer,
        text_encoder_3=t5, tokenizer_3=t5_tokenizer,
    )  # fmt: skip
    pipe.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    # Read without a dtype, transformers would keep float16 where diffusers takes float32.
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        file = folder / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


def write_clip(folder: Path, clip: CLIPModel, tokenizer: CLIPTokenizer) -> None:
    """The CLIP folder, weights in float16."""
    clip.half().save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    preprocessing = {"image_processor_type": "CLIPImageProcessor", "size": 64, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=1))


def measure(folder: Path, t5_zeros: int, guidance: float, n: int = 1024) -> dict[str, float]:
    """Mean gold scores on held-out captions by the stock pipeline, 10 steps, four kinds with equal chance."""
    absent = {} if t5_zeros else {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, dtype=torch.float32, **absent)
    pipe.set_progress_bar_config(disable=True)
    texts = [c.text for c in sample_captions(n, np.random.default_rng(13), heldout=True)]
    generator, pictures = torch.Generator().manual_seed(17), []
    for i in range(0, n, 128):
        call = dict(num_inference_steps=10, guidance_scale=guidance, max_sequence_length=t5_zeros, output_type="pt")
        pictures.append(pipe(texts[i : i + 128], generator=generator, **call).images)
    return {name: values.mean().item() for name, values in verify(torch.cat(pictures), texts).items()}


def write_card(folder: Path, seconds: float) -> None:
    """Model card with the figures of the written weights."""
    rows = []
    for zeros, guidance in ((0, 1.0), (T5_ZEROS, 1.0), (0, 3.0)):
        scores = measure(folder, zeros, guidance, 1024 if guidance == 1 else 256)
        rows.append(f"| {zeros} | {guidance:g} | " + " | ".join(f"{v:.3f}" for v in scores.values()) + " |")
        print(rows[-1], flush=True)
    table = "\n".join(["| max_sequence_length | guidance | clauses | correct | cleanliness | gold |", "|---|---|---|---|---|---|", *rows])
    (folder / "README.md").write_text(CARD.format(table=table, minutes=seconds / 60, steps=SD3_STEPS, batch=SD3_BATCH, pictures=PICTURES))


CARD = """# tiny-sd3

A `StableDiffusion3Pipeline` for the shapes world: 64 x 64 pictures of one to three coloured shapes. Good but improvable, a
base model for reinforcement learning on a CPU.

Trained from scratch on {pictures} rendered pictures ({steps} steps of {batch}; held-out captions never shown) by

    make assets

in {minutes:.0f} minutes on two cores. Weights are float16; load them as float32 on a CPU.

Held-out captions, the four kinds with equal chance, 10 Euler steps, stock pipeline (1024 pictures at guidance 1, 256 at 3):

{table}

`max_sequence_length` is the number of zero vectors that the pipeline appends in place of a T5 encoder. The model was
trained with none and with the default 256, so `StableDiffusion3Pipeline.from_pretrained(...)(prompt)` draws as it is; 0 is
three times faster.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("assets"), help="where the finished models go")
    parser.add_argument("--work", type=Path, default=Path("build/assets"), help="where unfinished stages keep their state")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    keep_heap()
    args.work.mkdir(parents=True, exist_ok=True)

    tokenizer = build_tokenizer(args.work / "tokenizer")
    write_prompts(args.out / "prompts")
    pictures = draw(training_captions(args.seed), args.seed)
    vae = build_vae(args.work, pictures, args.seed)
    latents = encode_all(args.work, vae, pictures)
    del pictures
    policy = build_sd3(args.work, latents, vae, tokenizer, args.seed)
    clip = build_clip(args.work, tokenizer, args.seed)
    write_clip(args.out / "tiny-clip", clip, tokenizer)
    write_sd3(args.out / "tiny-sd3", policy, vae, tokenizer, SHIFT)
    write_card(args.out / "tiny-sd3", seconds_spent(args.work))


if __name__ == "__main__":
    main()
