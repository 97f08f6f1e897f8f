"""The streaming engine: pure torch, knows nothing of ComfyUI.

Read in the order a weight travels: `block` (what is moved), `codec` (how its bytes look), `plan` (what stays and what
streams), `store` (host memory, which `host_memory` counts and locks), `ring` (device memory), `walk` (which block is
next), `pipeline` (fetch, wait, bind, free), `session` (the whole on one module), with `device` and `simulated`
underneath and `meter` beside them.
"""
