"""What dev.py does on a machine: environment, ComfyUI, server, checks. Standard library only."""
