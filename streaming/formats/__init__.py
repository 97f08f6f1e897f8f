"""Weights as files hold them. Pure torch; never imports comfy, nodes or the server."""
