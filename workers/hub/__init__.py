"""The Hub: models that are named by Hub ids, and all else that is done by huggingface_hub, imported nowhere else."""
