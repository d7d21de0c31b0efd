"""One module per group of commands. Their own imports are light: `--help` loads them."""
