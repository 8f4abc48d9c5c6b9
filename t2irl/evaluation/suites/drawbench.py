"""DrawBench (Saharia et al. 2022): 200 prompts in 11 categories, without a scorer of its own."""

from __future__ import annotations

from typing import Literal

from t2irl.errors import DataError
from t2irl.evaluation.suites.base import Prompt, Suite, read_table, read_text


class DrawBench(Suite):
    """The usual place to report aesthetics and preference scores after training for something else."""

    class Config(Suite.Config):
        """Settings."""

        type: Literal["drawbench"] = "drawbench"

    def prompts(self) -> list[Prompt]:
        """The published table, comma- or tab-separated: `Prompts` and `Category`."""
        name = "Prompt" if read_text(self.config.path, self.where).startswith("Prompt,") else "Prompts"
        rows = read_table(self.config.path, self.where, (name, "Category"))
        found = [
            Prompt(row[name].strip(), (row["Category"] or "").strip()) for row in rows if (row[name] or "").strip()
        ]
        if not found:
            raise DataError(f"{self.where}: holds no prompts")
        return found
