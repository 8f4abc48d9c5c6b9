"""What each of several processes does with an adversary: scenarios of `worker`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from t2irl import registry
from t2irl.errors import DataError
from t2irl.types import PromptGroups
from t2irl.utils import distributed
from tests.adversaries import write_dino, write_references

CPU = torch.device("cpu")


def adversary() -> dict[str, Any]:
    """Three iterations of an adversary that sees other pictures, and other numbers of them, on each process."""
    return _iterations(None)


def beside() -> dict[str, Any]:
    """The same of one that judges pictures beside reference images, and learns from spoilt ones."""
    return _iterations({"images": 2}, {"kinds": ["ghost", "bands"]})


def _iterations(condition: dict[str, Any] | None, negatives: dict[str, Any] | None = None) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    prompts, side = [f"thing {k}" for k in range(6)], 16
    files = {text: [rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(3)] for text in prompts}
    rollouts = torch.from_numpy(rng.integers(0, 100, (3, 24, 3, side, side), dtype=np.uint8)).float() / 255
    whole = PromptGroups.of(prompts, [i // 4 for i in range(24)], [i % 4 for i in range(24)])
    mine = slice(0, 24)
    if distributed.world_size() > 1:  # the second group lies on both
        mine = slice(0, 6) if distributed.rank() == 0 else slice(6, 24)
    found: dict[str, Any] = {"metrics": []}
    with tempfile.TemporaryDirectory() as own:
        folder = Path(distributed.gather_objects(own)[0])
        if distributed.rank() == 0:  # transformers writes a model on the first process only
            write_dino(folder / "dino", side)
            write_references(folder / "references", files)
        distributed.barrier()
        kind = registry.find("rewards", "adversarial_dino")
        config = kind.Config.model_validate(
            {
                "path": folder / "dino", "lr": 1e-3, "heldout": 0.3, "batch_size": 5, "reencode": False,
                "references": {"index": folder / "references" / "index.json"},
                "replay": {"size": 9, "add": 6, "share": 0.5}, "penalty": {"on": "features", "weight": 0.1},
                "condition": condition, "negatives": negatives,
            }
        )  # fmt: skip
        reward = registry.build("rewards", config, CPU)
        reward.prepare(prompts, None)
        for images in rollouts:
            scores = reward.score(images[mine], whole[mine])
            found["metrics"].append(reward.update(images[mine], whole[mine]))
        found["scores"] = scores
        found["start"] = torch.cat([p.detach().flatten() for p in kind(config, CPU).critic.trained.values()])
        found["state"] = reward.state_dict()
        found["weights"] = torch.cat([p.detach().flatten() for p in reward.critic.trained.values()])
        distributed.barrier()  # the folder goes with the first process
    return found


def lacking() -> dict[str, Any]:
    """Every process has reference images of its own, as with a disk in each node, and the last one lacks a file: what is said."""
    kind, prompts, said = registry.find("rewards", "adversarial_dino"), ["thing 0", "thing 1"], []
    for gone in (False, True):
        with tempfile.TemporaryDirectory() as own:
            index = write_references(Path(own), {text: [np.zeros((16, 16, 3), np.uint8)] for text in prompts})
            if gone and distributed.rank() == distributed.world_size() - 1:
                (Path(own) / "001_0.png").unlink()
            config = kind.Config.model_validate({"references": {"index": index}})
            try:
                kind.check(config, prompts)
                said.append("")
            except DataError as error:
                said.append(str(error))
    return {"said": said, "waited": distributed.gather_objects(distributed.rank())}
