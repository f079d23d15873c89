"""The ComfyUI pack: native UniPic2 editing on ComfyUI's own MODEL, CLIP, VAE and samplers.

Imports ComfyUI and `core` only. Everything imported here is already loaded when ComfyUI loads packs.
"""

from comfy_api.latest import ComfyExtension

from . import micro_model, nodes


class UniPic2Extension(ComfyExtension):
    """What ComfyUI asks for the pack's nodes."""

    async def get_node_list(self):
        """Return the node classes in menu order."""
        # Here, not in on_load: ComfyUI 0.3.64 does not call that one.
        micro_model.register_folders()
        return list(nodes.NODES)
