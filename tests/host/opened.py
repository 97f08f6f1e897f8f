"""The one real ComfyUI that this process tests, opened here on the processor, with weights in the type of their file.

It is the first that `COMFYUI_PATH` names, or the first found.
"""

from scripts.hosts import find_host, open_host

HOST = find_host()
open_host(HOST, "--cpu", "--bf16-unet")
