"""A checkpoint for other programs and people: a safetensors file, or a folder with a model card."""
