"""Suites of prompts, one a file: where prompts come from, how many pictures each gets, what the official scorer wants."""
