"""The pack's nodes. Ids, input names and output order are for ever: workflows store them."""

import node_helpers
import torch
from comfy_api.latest import io

from ..core.errors import InputError
from ..core.micro import IMAGE_SIZE, MAX_TOKENS
from ..core.prompts import POSITIONS
from ..core.sizes import MAX_EDGE
from . import kontext, metaquery, micro_model, pictures, text

CATEGORY = "UniPic2"
Connector = io.Custom("UNIPIC2_CONNECTOR")


class UniPic2MicroLoader(io.ComfyNode):
    """Load a micro model's three parts at once."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="UniPic2MicroLoader",
            display_name="UniPic2 Micro Loader",
            category=CATEGORY,
            description=(
                "Load a micro UniPic2: a complete text-to-image and editing model of a few million weights that "
                f"draws {IMAGE_SIZE}x{IMAGE_SIZE} pictures of coloured shapes within seconds on a CPU."
            ),
            inputs=[
                io.Combo.Input(
                    "model",
                    options=list(micro_model.available_models()),
                    default=micro_model.DEFAULT_MODEL,
                    tooltip=(
                        "Which micro model: one that comes with the pack (micro is micro-pretrained after "
                        "reinforcement learning), or a folder in models/unipic2 that the trainer exported "
                        "(transformer, vae, text_encoder, tokenizer)."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="MODEL", tooltip="The transformer. Put UniPic2 Enable Editing behind it to edit."
                ),
                io.Clip.Output(display_name="CLIP", tooltip=f"The text encoder; it reads {MAX_TOKENS} tokens."),
                io.Vae.Output(display_name="VAE", tooltip="The picture codec, 8x8 pixels per latent."),
            ],
        )

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        models = micro_model.available_models()
        if model not in models:
            raise InputError(
                "UniPic2 Micro Loader, model",
                found=repr(model),
                expected=" or ".join(map(repr, models)),
                remedy="Put the exported folder into models/unipic2 and press R to refresh.",
            )
        return io.NodeOutput(*micro_model.load(models[model]))


class UniPic2EnableEditing(io.ComfyNode):
    """Patch a stock SD3 MODEL so that it reads reference latents."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="UniPic2EnableEditing",
            display_name="UniPic2 Enable Editing",
            category=CATEGORY,
            description=(
                "Let a UniPic2-SD3.5M-Kontext model see the reference picture of UniPic2 Reference. Without a "
                "reference the model draws exactly as before."
            ),
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip=(
                        "UniPic2 transformer from any loader (Load Diffusion Model, Load Checkpoint, GGUF, LoRA). "
                        "The loaded model itself is not changed."
                    ),
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="The model with editing; for any sampler node.")],
        )

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        return io.NodeOutput(kontext.enable_editing(model))


class UniPic2TextEncode(io.ComfyNode):
    """Encode both prompts as the published pipeline does."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="UniPic2TextEncode",
            display_name="UniPic2 Text Encode",
            category=CATEGORY,
            description=(
                "Encode prompt and negative prompt as UniPic2's published pipeline does: CLIP cut at 77 tokens, "
                "T5 padded or cut to 256, so both have one length and are sampled in one batch."
            ),
            inputs=[
                io.Clip.Input(
                    "clip", tooltip="SD3's text encoders (CLIP-L, CLIP-G, T5-XXL) or the micro model's CLIP."
                ),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="What to draw, or which change to make. (word:1.2) weighs a word. Empty: unconditional.",
                ),
                io.String.Input(
                    "negative_prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="What to move away from; its effect grows with the sampler's cfg. Empty: unconditional.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The encoded prompt."),
                io.Conditioning.Output(display_name="negative", tooltip="The encoded negative prompt."),
            ],
        )

    @classmethod
    def execute(cls, clip, prompt, negative_prompt) -> io.NodeOutput:
        return io.NodeOutput(
            text.encode(clip, prompt, "prompt"), text.encode(clip, negative_prompt, "negative_prompt")
        )


class UniPic2EditImageSize(io.ComfyNode):
    """Bring a picture to a size the model edits well."""

    NAME = "UniPic2 Edit Image Size"

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="UniPic2EditImageSize",
            display_name=cls.NAME,
            category=CATEGORY,
            description=(
                "Resize a picture for editing: the longer edge goes to a target, the shape is kept, both edges "
                "become multiples of 32 pixels. Bicubic; transparency is laid on white."
            ),
            inputs=[
                io.Image.Input("image", tooltip="The picture to edit, any size; a batch keeps one common size."),
                io.Int.Input(
                    "longer_edge",
                    default=512,
                    min=16,
                    max=MAX_EDGE,
                    step=16,
                    tooltip=(
                        "Longer edge of the result in pixels. 512 is what UniPic2 was published with, 1024 shows "
                        f"more detail and takes at least four times as long, {IMAGE_SIZE} is the micro model's size."
                    ),
                ),
                io.Int.Input(
                    "multiple",
                    default=32,
                    min=pictures.PATCH_PIXELS,
                    max=128,
                    step=pictures.PATCH_PIXELS,
                    tooltip=(
                        "Both edges become multiples of this many pixels. 32 as published; 16, the least the model "
                        "takes, keeps the shape more exactly."
                    ),
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The resized picture, RGB."),
                io.Int.Output(display_name="width", tooltip="Its width in pixels."),
                io.Int.Output(display_name="height", tooltip="Its height in pixels."),
            ],
        )

    @classmethod
    def execute(cls, image, longer_edge, multiple) -> io.NodeOutput:
        if longer_edge < multiple:
            raise InputError(
                f"{cls.NAME}, longer_edge", found=longer_edge, expected=f"at least multiple, {multiple} pixels"
            )
        image = pictures.resize_for_editing(image, longer_edge, multiple, f"{cls.NAME}, image")
        return io.NodeOutput(image, image.shape[2], image.shape[1])


class UniPic2Reference(io.ComfyNode):
    """Attach the picture to edit to both prompts."""

    NAME = "UniPic2 Reference"

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="UniPic2Reference",
            display_name=cls.NAME,
            category=CATEGORY,
            description=(
                "Make a picture the reference of an edit. Both prompts get it, as UniPic2 was trained, and the "
                "empty latent has its size. The model needs UniPic2 Enable Editing."
            ),
            inputs=[
                io.Conditioning.Input("positive", tooltip="The encoded instruction."),
                io.Conditioning.Input("negative", tooltip="The encoded negative prompt; it gets the picture as well."),
                io.Vae.Input("vae", tooltip="The VAE of SD3.5, or of the micro model."),
                io.Image.Input(
                    "image",
                    tooltip=(
                        "The picture to edit. Its edges must be multiples of 16 pixels (UniPic2 Edit Image Size "
                        "does that). A batch of N pictures gives N edits."
                    ),
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The instruction with the reference."),
                io.Conditioning.Output(display_name="negative", tooltip="The negative prompt with the reference."),
                io.Latent.Output(display_name="latent", tooltip="An empty latent of the picture's size and batch."),
            ],
        )

    @classmethod
    def execute(cls, positive, negative, vae, image) -> io.NodeOutput:
        latents = pictures.encode_reference(vae, image, cls.NAME)
        values = {"reference_latents": [latents]}
        return io.NodeOutput(
            node_helpers.conditioning_set_values(positive, values, append=True),
            node_helpers.conditioning_set_values(negative, values, append=True),
            {"samples": torch.zeros_like(latents), "downscale_ratio_spacial": 8},
        )


class UniPic2ConnectorLoader(io.ComfyNode):
    """Load MetaQuery's queries and connector."""

    NAME = "UniPic2 Load Connector"

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="UniPic2ConnectorLoader",
            display_name=cls.NAME,
            category=CATEGORY,
            description=(
                "Load the queries and the connector of UniPic2-MetaQuery, which turn what Qwen2.5-VL understood into "
                "what the transformer reads as text."
            ),
            inputs=[
                io.Combo.Input(
                    "connector",
                    options=list(metaquery.available_connectors()),
                    tooltip=(
                        "A file in models/model_patches (the published conditioner's safetensors), or the connector "
                        "of a micro model."
                    ),
                ),
            ],
            outputs=[Connector.Output(display_name="CONNECTOR", tooltip="For UniPic2 MetaQuery Encode.")],
        )

    @classmethod
    def execute(cls, connector) -> io.NodeOutput:
        connectors = metaquery.available_connectors()
        if connector not in connectors:
            raise InputError(
                f"{cls.NAME}, connector",
                found=repr(connector),
                expected=" or ".join(map(repr, connectors)) or "a file",
                remedy="Put the conditioner's safetensors file into models/model_patches and press R to refresh.",
            )
        return io.NodeOutput(metaquery.load_connector(connectors[connector]))


class UniPic2MetaQueryEncode(io.ComfyNode):
    """Encode both prompts through Qwen2.5-VL and the connector."""

    NAME = "UniPic2 MetaQuery Encode"

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="UniPic2MetaQueryEncode",
            display_name=cls.NAME,
            category=CATEGORY,
            description=(
                "Encode prompt and negative prompt through Qwen2.5-VL and MetaQuery's connector. With a picture the "
                "language model sees what is to be edited; put UniPic2 Reference behind it for the edit itself."
            ),
            inputs=[
                io.Clip.Input("clip", tooltip="Qwen2.5-VL from Load CLIP (the file of Qwen-Image, fp8 too)."),
                Connector.Input("connector", tooltip="Queries and connector, trained for this Qwen2.5-VL."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="What to draw, or which change to make. Plain words: (word:1.2) is read as it stands.",
                ),
                io.String.Input(
                    "negative_prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="What to move away from; its effect grows with the sampler's cfg. Empty: unconditional.",
                ),
                io.Combo.Input(
                    "positions",
                    options=list(POSITIONS),
                    default=POSITIONS[0],
                    tooltip=(
                        "How the picture's tokens are numbered: 1d as the published model was run, mrope by rows and "
                        "columns, for models that were trained so."
                    ),
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip=(
                        "The picture to edit, at the size it is drawn at (UniPic2 Edit Image Size with multiple 32). "
                        "A batch of N pictures gives N edits. Nothing: text-to-image."
                    ),
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The encoded prompt."),
                io.Conditioning.Output(display_name="negative", tooltip="The encoded negative prompt."),
            ],
        )

    @classmethod
    def execute(cls, clip, connector, prompt, negative_prompt, positions, image=None) -> io.NodeOutput:
        prompts = (prompt, negative_prompt)
        return io.NodeOutput(*metaquery.encode(clip, connector, prompts, image, positions, cls.NAME))


class UniPic2Understand(io.ComfyNode):
    """Ask Qwen2.5-VL about a picture."""

    NAME = "UniPic2 Understand"

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="UniPic2Understand",
            display_name=cls.NAME,
            category=CATEGORY,
            description=(
                "Ask the Qwen2.5-VL of UniPic2-MetaQuery about a picture, by ComfyUI's own text generation. The "
                "answer can drive an instruction."
            ),
            inputs=[
                io.Clip.Input("clip", tooltip="Qwen2.5-VL from Load CLIP, or of a micro model."),
                io.String.Input(
                    "question",
                    multiline=True,
                    dynamic_prompts=True,
                    default="Describe the image in detail.",
                    tooltip="What to ask. Markup of chats in it is read as text.",
                ),
                io.Combo.Input(
                    "lm_head",
                    options=metaquery.available_heads(),
                    default=metaquery.TIED,
                    tooltip=(
                        "Where the output layer comes from. Qwen2.5-VL-7B: the same file as in Load CLIP, which "
                        "leaves that layer out. Micro models: none, theirs is the embedding."
                    ),
                ),
                io.Int.Input("max_length", default=256, min=1, max=8192, tooltip="Tokens of the answer at most."),
                io.Float.Input(
                    "temperature",
                    default=0.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="0 takes the likeliest word each time; above it, answers vary with the seed.",
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**64 - 1, tooltip="Of the draws under temperature above 0."
                ),
                io.Image.Input("image", optional=True, tooltip="The picture asked about; of a batch the first one."),
            ],
            outputs=[io.String.Output(display_name="answer", tooltip="The answer, without markup.")],
        )

    @classmethod
    def execute(cls, clip, question, lm_head, max_length, temperature, seed, image=None) -> io.NodeOutput:
        sampling = {"do_sample": temperature > 0, "temperature": temperature, "top_k": 50, "top_p": 0.9, "seed": seed}
        return io.NodeOutput(metaquery.answer(clip, question, image, lm_head, max_length, sampling, cls.NAME))


NODES = [
    UniPic2MicroLoader,
    UniPic2EnableEditing,
    UniPic2TextEncode,
    UniPic2EditImageSize,
    UniPic2Reference,
    UniPic2ConnectorLoader,
    UniPic2MetaQueryEncode,
    UniPic2Understand,
]
"""In menu order."""
