"""HTTP in front of the engine: the OpenAI endpoints, the page, metrics. `lowbit serve` starts it."""
