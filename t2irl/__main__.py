"""`python -m t2irl` and `accelerate launch -m t2irl`: the same program as the `t2irl` command."""

from __future__ import annotations

from t2irl.cli import entry

if __name__ == "__main__":
    entry()
