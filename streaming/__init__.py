"""LayerStream: `engine` streams the blocks of any torch module; `host` fits it into ComfyUI."""
