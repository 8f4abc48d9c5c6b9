"""The laboratory of reward hacking: a grid of methods, proxies and seeds, compared by a reward that none was trained on."""
