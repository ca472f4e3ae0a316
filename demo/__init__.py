"""What `python dev.py demo` runs: tiny checkpoints, the shipped workflows, a page about them."""
