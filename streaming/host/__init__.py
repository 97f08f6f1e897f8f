"""Everything that knows ComfyUI: its model patcher, its models, its server."""
