"""Publishing: what a pruned model will look like, what a folder holds, model cards, and the Hugging Face Hub."""
