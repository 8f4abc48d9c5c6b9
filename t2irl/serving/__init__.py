"""Rewards behind HTTP: what crosses the wire, the server and its limits. The client is `t2irl.rewards.remote`."""
