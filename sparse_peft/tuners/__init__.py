"""What is trained: one folder a method, each with PEFT's own trio of config, layer and model."""
