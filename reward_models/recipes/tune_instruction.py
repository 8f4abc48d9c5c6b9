"""Find what to ask a frozen judge: automatic prompt optimisation on a small labelled set (arXiv 2601.03468; ProTeGi).

    python -m reward_models.recipes.tune_instruction --images labelled.jsonl --server http://localhost:8000/v1 --out beam.json

The judge looks at pictures that it got wrong and says why in words; the instruction is written anew for each reason. What is
kept is decided on a quarter of the prompts, what is reported is measured on another one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from reward_models.judges import LEAST_MASS, SEED_INSTRUCTION, Judge, LocalJudge, ServerJudge, cleanliness
from reward_models.recipes.command import command
from reward_models.recipes.labelled import Labelled, load_labelled, split

EPSILON = 1e-8
"""Keeps the logarithm finite."""


@dataclass(frozen=True)
class Settings:
    """Of the search; as published unless it says otherwise."""

    rounds: int = 6
    """Most rounds; it stops earlier when a round brings nothing (published: it does not)."""
    beam: int = 4
    """Instructions kept after a round."""
    batch: int = 60
    """Pictures to learn from in a round, in which errors are looked for."""
    reasons: int = 4
    """Reasons asked for, for each instruction of the beam."""
    errors: int = 4
    """Most wrongly judged pictures shown for a reason."""
    children: int = 5
    """Most new instructions kept of one parent, drawn at random, before they are scored."""


class Critic(Protocol):
    """Writes. `seed` makes each call repeatable."""

    def reason(self, instruction: str, wrong: Sequence[Labelled], seed: int) -> str:
        """Why an instruction misled the judge about these pictures."""
        ...

    def rewrite(self, instruction: str, reason: str, seed: int) -> str:
        """A new instruction that takes a reason into account."""
        ...

    def paraphrase(self, instruction: str, seed: int) -> str:
        """The same in other words."""
        ...


Score = Callable[[str, Sequence[Labelled]], Tensor]
"""P(artifact) in [0, 1] of pictures (n,) under an instruction."""


@dataclass(frozen=True)
class Found:
    """An instruction and its mean log-likelihood on the pictures for selection."""

    text: str
    score: float


def log_likelihood(p: Tensor, labels: Tensor) -> float:
    """S(P) = mean[y log(p + 1e-8) + (1 - y) log(1 - p + 1e-8)], at most about 0; higher is better. `p`, `labels`: (n,)."""
    p, y = p.double(), labels.double()
    return float((y * (p + EPSILON).log() + (1 - y) * (1 - p + EPSILON).log()).mean())


def balanced_accuracy(p: Tensor, labels: Tensor) -> float:
    """Mean of the shares of broken and of clean pictures that are told right at 0.5: 0.5 is chance."""
    right = (p >= 0.5) == (labels == 1)
    return float(sum(right[labels == y].double().mean() for y in (0, 1)) / 2)


def labels_of(items: Sequence[Labelled]) -> Tensor:
    """(n,) int64."""
    return torch.tensor([x.label for x in items])


def tune(
    start: str, learn: Sequence[Labelled], select: Sequence[Labelled], score: Score, critic: Critic,
    settings: Settings = Settings(), seed: int = 0, say: Callable[[str], None] = lambda text: None,
) -> list[Found]:  # fmt: skip
    """The beam, best first. Errors come from `learn`, what survives a round is decided on `select`.

    Stops when the best score on `select` does not rise in a round.
    """
    rng, kept = np.random.default_rng(seed), labels_of(select)

    def scored(texts: Sequence[str]) -> list[Found]:
        return [Found(text, log_likelihood(score(text, select), kept)) for text in texts]

    beam = scored([start])
    say(f"start: {beam[0].score:.4f}")
    for number in range(settings.rounds):
        batch = [learn[k] for k in rng.permutation(len(learn))[: settings.batch]]
        known = {found.text for found in beam}
        new = [text for parent in beam for text in _children(parent.text, batch, score, critic, settings, rng)]
        before = beam[0].score
        beam = sorted(beam + scored([t for t in dict.fromkeys(new) if t not in known]), key=lambda f: -f.score)[
            : settings.beam
        ]
        say(f"round {number + 1}: {beam[0].score:.4f}")
        if beam[0].score <= before:
            break
    return beam


def _children(
    parent: str, batch: Sequence[Labelled], score: Score, critic: Critic, settings: Settings, rng: np.random.Generator
) -> list[str]:
    """New instructions from one: a rewrite for each reason, and a paraphrase of each rewrite and of the parent."""
    told = score(parent, batch) >= 0.5
    wrong = [x for x, says in zip(batch, told.tolist(), strict=True) if says != (x.label == 1)]
    rewrites = []
    for _ in range(settings.reasons if wrong else 0):
        shown = [wrong[k] for k in rng.permutation(len(wrong))[: settings.errors]]
        reason = critic.reason(parent, shown, _draw(rng))
        rewrites.append(critic.rewrite(parent, reason, _draw(rng)))
    texts = [*rewrites, *(critic.paraphrase(text, _draw(rng)) for text in (parent, *rewrites))]
    fresh = [text.strip() for text in dict.fromkeys(texts) if text.strip() and text.strip() != parent]
    return [fresh[k] for k in sorted(rng.permutation(len(fresh))[: settings.children])]


def _draw(rng: np.random.Generator) -> int:
    return int(rng.integers(2**31))


class JudgeScore:
    """A judge's P(artifact), each (instruction, picture) asked once. A picture that is not answered counts as broken."""

    def __init__(self, judge: Judge, least: float = LEAST_MASS, batch: int = 16):
        self.judge, self.least, self.batch = judge, least, batch
        self._known: dict[tuple[str, Labelled], float] = {}

    def __call__(self, instruction: str, items: Sequence[Labelled]) -> Tensor:
        """(n,) float64 in [0, 1]."""
        new = [x for x in dict.fromkeys(items) if (instruction, x) not in self._known]
        for start in range(0, len(new), self.batch):
            part = new[start : start + self.batch]
            answers = self.judge.log_answers([x.picture() for x in part], instruction)
            clean = cleanliness(answers[:, 0], answers[:, 1], self.least)[0]
            self._known |= {(instruction, x): 1 - float(c) for x, c in zip(part, clean, strict=True)}
        return torch.tensor([self._known[instruction, x] for x in items], dtype=torch.float64)


class JudgeCritic:
    """The judge itself, writing at a temperature."""

    def __init__(self, judge: Judge, temperature: float = 0.7, length: int = 2048):
        self.judge, self.temperature, self.length = judge, temperature, length

    def reason(self, instruction: str, wrong: Sequence[Labelled], seed: int) -> str:
        """See `Critic`."""
        said = "\n".join(
            f"Picture {k}: the right answer is {'YES' if x.label else 'NO'}, the inspector said {'NO' if x.label else 'YES'}."
            for k, x in enumerate(wrong, 1)
        )
        request = (
            f"An inspector of generated pictures was given this instruction:\n\n{instruction}\n\nYES means that a picture shows a "
            f"defect. About these pictures the inspector was wrong:\n{said}\n\nName one flaw of the instruction that explains the "
            "errors. Answer in at most three sentences."
        )
        return self.judge.reply(request, [x.picture() for x in wrong], seed, self.temperature, self.length)

    def rewrite(self, instruction: str, reason: str, seed: int) -> str:
        """See `Critic`."""
        request = (
            f"This instruction is given to an inspector of generated pictures:\n\n{instruction}\n\nIts flaw: {reason}\n\nWrite the "
            "instruction anew without this flaw. It must ask for an answer of one word, YES if a defect is visible and NO "
            "otherwise. Reply with the new instruction alone."
        )
        return self.judge.reply(request, [], seed, self.temperature, self.length)

    def paraphrase(self, instruction: str, seed: int) -> str:
        """See `Critic`."""
        request = f"Say the same in other words, and reply with that alone:\n\n{instruction}"
        return self.judge.reply(request, [], seed, self.temperature, self.length)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument(
        "--images", type=Path, required=True, help="labelled pictures, see reward_models/recipes/labelled.py"
    )
    place = cli.add_mutually_exclusive_group(required=True)
    place.add_argument("--model", type=Path, help="folder of a vision-language model")
    place.add_argument("--server", help="address of an OpenAI-compatible server, ending in /v1")
    cli.add_argument("--server-model", help="name of the model on the server, if it offers several")
    cli.add_argument("--api-key-env", help="environment variable that holds the server's key; without it, no key")
    cli.add_argument("--start", type=Path, default=SEED_INSTRUCTION, help="text file to start from")
    cli.add_argument(
        "--out", type=Path, required=True, help="JSON file of the beam; the best one also goes to .md beside it"
    )
    cli.add_argument("--rounds", type=int, default=Settings.rounds)
    cli.add_argument("--seed", type=int, default=42)
    cli.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    cli.add_argument("--answer-mass", type=float, default=LEAST_MASS, help="as in the reward (default 0.2)")
    cli.add_argument("--length", type=int, default=2048, help="most tokens that the critic may write")
    return cli


def main(argv: Sequence[str] | None = None) -> int:
    """Search, and write the beam. Returns the exit code."""
    return command(parser(), run, argv)


def server_key(args: argparse.Namespace) -> str | None:
    """The key from the environment, as the reward reads it. Raises ValueError for a missing one, or an option without a server."""
    for option, value in (("--server-model", args.server_model), ("--api-key-env", args.api_key_env)):
        if value is not None and args.server is None:
            raise ValueError(f"{option} {value} belongs to --server, which is missing; give --server, or drop it")
    if args.api_key_env is None:
        return None
    key = os.environ.get(args.api_key_env)
    if not key:
        raise ValueError(
            f"--api-key-env {args.api_key_env}: no such environment variable, or it is empty; set it first"
        )
    return key


def run(args: argparse.Namespace) -> None:
    """What `main` does, with errors raised."""
    key = server_key(args)
    parts = split(load_labelled(args.images), args.seed)
    judge: Judge
    if args.server:
        judge = ServerJudge(args.server, args.server_model, key)
    else:
        dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
        judge = LocalJudge.load(args.model, torch.device(args.device), dtype)
    score, start = JudgeScore(judge, args.answer_mass), args.start.read_text(encoding="utf-8").strip()
    critic, settings = JudgeCritic(judge, length=args.length), Settings(rounds=args.rounds)
    beam = tune(start, parts["train"], parts["select"], score, critic, settings, args.seed, print)
    truth = labels_of(parts["report"])
    entries = []
    for found in [*beam, Found(start, beam[0].score)]:
        p = score(found.text, parts["report"])
        figures = {"log_likelihood": log_likelihood(p, truth), "balanced_accuracy": balanced_accuracy(p, truth)}
        entries.append({"text": found.text, "select": found.score, "report": figures})
    counts = {name: len(members) for name, members in parts.items()}
    content = {"beam": entries[:-1], "start": {k: entries[-1][k] for k in ("text", "report")}, "pictures": counts}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    args.out.with_suffix(".md").write_text(beam[0].text + "\n", encoding="utf-8")
    before, after = (e["report"]["balanced_accuracy"] for e in (entries[-1], entries[0]))
    print(
        f"{args.out}: {len(beam)} instructions; balanced accuracy on {counts['report']} unseen pictures {before:.3f} -> {after:.3f}"
    )


if __name__ == "__main__":
    sys.exit(main())
