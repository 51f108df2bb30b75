"""What happens during training besides the optimizer's steps."""
