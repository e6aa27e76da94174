"""What goes in: the little world, tasks, bases, tokenizers, checkpoints, own data (data/README.md)."""
