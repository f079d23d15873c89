"""UniPic2: the ComfyUI pack (`comfy_nodes`), the trainer (`trainer`) and what both agree on (`core`).

ComfyUI loads this file by path; pip installs the same folder as `unipic2`. It therefore imports
nothing of ours at load time: `comfy_entrypoint` brings the nodes in when ComfyUI asks for them.
"""

WEB_DIRECTORY = "./web"  # ComfyUI serves the nodes' help pages from it


async def comfy_entrypoint():
    """Return the V3 extension with the pack's nodes (called once by ComfyUI at start-up)."""
    import logging

    try:
        from .comfy_nodes import UniPic2Extension
    except Exception:
        # ComfyUI logs only str(error) for a failing entrypoint; people need the traceback to report it.
        logging.exception("UniPic2: the node pack could not be imported")
        raise
    return UniPic2Extension()
