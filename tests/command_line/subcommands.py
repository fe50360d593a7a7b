"""Commands of the groups `analyze`, `prompts` and `control`."""

SUBCOMMANDS = frozenset(
    {"analyze heads", "prompts similarity", "prompts spot", "prompts transfer", "control train", "control generate"}
)
