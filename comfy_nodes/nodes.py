"""The pack's nodes. Ids, input names and output order are for ever: workflows store them."""

import node_helpers
import torch
from comfy_api.latest import io

from ..core.errors import InputError
from ..core.micro import IMAGE_SIZE, MAX_TOKENS
from ..core.prompts import POSITIONS
from ..core.sizes import FITS, MAX_EDGE
from ..core.sizes import Placement as PlacementValue
from . import kontext, metaquery, micro_model, pictures, published, text

CATEGORY = "UniPic2"
Connector = io.Custom("UNIPIC2_CONNECTOR")
Placement = io.Custom("UNIPIC2_PLACEMENT")
_SOCKETS = {
    "IMAGE": lambda value: isinstance(value, torch.Tensor),
    "MASK": lambda value: isinstance(value, torch.Tensor),
    "CONDITIONING": lambda value: isinstance(value, list) and all(len(part) == 2 for part in value),
    "MODEL": lambda value: hasattr(value, "get_model_object"),
    "CLIP": lambda value: hasattr(value, "tokenize"),
    "VAE": lambda value: hasattr(value, "encode") and hasattr(value, "decode"),
    "UNIPIC2_CONNECTOR": lambda value: hasattr(value, "model"),
    "UNIPIC2_PLACEMENT": lambda value: isinstance(value, PlacementValue),
}
"""Whether a value can be what a socket's type says."""
_MAY_BE_NOTHING = ("CLIP", "VAE", "UNIPIC2_CONNECTOR")
"""A loader may give nothing for these; nodes say themselves what to load."""


class _Node(io.ComfyNode):
    """Checks what comes in: ComfyUI hands on whatever a prompt over its API has in the place of a link."""

    @classmethod
    def execute(cls, **inputs) -> io.NodeOutput:
        """Return what `run` gives. Raises InputError for a value that is not of its socket's type."""
        described = cls.INPUT_TYPES()
        for part in ("required", "optional"):
            for name, (kind, *_) in described.get(part, {}).items():
                value, fits = inputs.get(name), _SOCKETS.get(kind) if isinstance(kind, str) else None
                if fits is None or (value is None and (part == "optional" or kind in _MAY_BE_NOTHING)):
                    continue
                if not fits(value):
                    found = "nothing" if value is None else f"a value of type {type(value).__name__}"
                    raise InputError(f"{cls.NAME}, {name}", found=found, expected=f"{kind} from another node")
        return cls.run(**inputs)


class UniPic2Loader(_Node):
    """Load a UniPic2 in any of its forms, ready for editing."""

    NAME = "UniPic2 Loader"

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="UniPic2Loader",
            display_name=cls.NAME,
            category=CATEGORY,
            description=(
                "Load a UniPic2 transformer in one step, with editing enabled: a folder as published (sharded or "
                "not), one file with diffusers' or ComfyUI's keys, fp8, or a whole checkpoint."
            ),
            inputs=[
                io.Combo.Input(
                    "model",
                    options=list(published.available(micro_model.available_models())),
                    tooltip=(
                        "A folder (with transformer/ and perhaps vae/) or a file in models/unipic2 or "
                        "models/diffusion_models, or a micro model that comes with the pack."
                    ),
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(published.WEIGHT_DTYPES),
                    default="default",
                    tooltip=(
                        "Type of the weights in memory. default: ComfyUI chooses for your device; fp8 takes half the "
                        "memory of 16 bits at some loss of quality."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The transformer with editing, for any sampler."),
                io.Vae.Output(
                    display_name="VAE", tooltip="The folder's or checkpoint's VAE. Without one take Load VAE instead."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, model, **_inputs):
        """Return what tells a model that was exported anew."""
        return published.fingerprint(published.available(micro_model.available_models()).get(model))

    @classmethod
    def run(cls, model, weight_dtype) -> io.NodeOutput:
        models = published.available(micro_model.available_models())
        if model not in models:
            raise InputError(
                f"{cls.NAME}, model",
                found=repr(model),
                expected="a folder or file in models/unipic2 or models/diffusion_models",
                remedy="Put it there and press R to refresh.",
            )
        return io.NodeOutput(*published.load(models[model], weight_dtype, cls.NAME))


class UniPic2MicroLoader(_Node):
    """Load a micro model's three parts at once."""

    NAME = "UniPic2 Micro Loader"

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="UniPic2MicroLoader",
            display_name=cls.NAME,
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
                        "reinforcement learning, micro-metaquery has a small Qwen2.5-VL), or a folder in "
                        "models/unipic2 that the trainer exported (transformer, vae, text_encoder, tokenizer)."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="MODEL", tooltip="The transformer. Put UniPic2 Enable Editing behind it to edit."
                ),
                io.Clip.Output(
                    display_name="CLIP",
                    tooltip=f"The text encoder, which reads {MAX_TOKENS} tokens, or the small Qwen2.5-VL.",
                ),
                io.Vae.Output(display_name="VAE", tooltip="The picture codec, 8x8 pixels per latent."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, model, **_inputs):
        """Return what tells a model that was exported anew."""
        return published.fingerprint(micro_model.available_models().get(model))

    @classmethod
    def run(cls, model) -> io.NodeOutput:
        models = micro_model.available_models()
        if model not in models:
            raise InputError(
                "UniPic2 Micro Loader, model",
                found=repr(model),
                expected=" or ".join(map(repr, models)),
                remedy="Put the exported folder into models/unipic2 and press R to refresh.",
            )
        return io.NodeOutput(*micro_model.load(models[model]))


class UniPic2EnableEditing(_Node):
    """Patch a stock SD3 MODEL so that it reads reference latents."""

    NAME = "UniPic2 Enable Editing"

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="UniPic2EnableEditing",
            display_name=cls.NAME,
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
    def run(cls, model) -> io.NodeOutput:
        editing = kontext.enable_editing(model)
        published.warn_of_shift(editing)
        return io.NodeOutput(editing)


class UniPic2TextEncode(_Node):
    """Encode both prompts as the published pipeline does."""

    NAME = "UniPic2 Text Encode"

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="UniPic2TextEncode",
            display_name=cls.NAME,
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
                    tooltip=(
                        "What to move away from; its effect grows with the sampler's cfg. Empty: what the task was "
                        "published with."
                    ),
                ),
                io.Combo.Input(
                    "task",
                    options=list(text.TASKS),
                    default=text.TASKS[0],
                    optional=True,
                    tooltip=(
                        "What an empty negative prompt means: nothing (unconditional) for text-to-image, the "
                        "published one against blur and unchanged pictures for an edit (micro models: nothing)."
                    ),
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The encoded prompt."),
                io.Conditioning.Output(display_name="negative", tooltip="The encoded negative prompt."),
            ],
        )

    @classmethod
    def run(cls, clip, prompt, negative_prompt, task=text.TASKS[0]) -> io.NodeOutput:
        return io.NodeOutput(
            text.encode(clip, prompt, "prompt"), text.encode(clip, negative_prompt, "negative_prompt", task)
        )


class UniPic2EditImageSize(_Node):
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
                "become multiples of 32 pixels. Bicubic; transparency is laid on white. UniPic2 Paste Back brings the "
                "edit onto the picture at full size."
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
                io.Combo.Input(
                    "fit",
                    options=list(FITS),
                    default=FITS[0],
                    optional=True,
                    tooltip=(
                        "Where the shape does not fit the multiples: stretch changes it by a few percent, crop cuts "
                        "off the border, pad repeats the border outwards."
                    ),
                ),
                io.Mask.Input("mask", optional=True, tooltip="A mask of the picture, to be brought to the same size."),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The resized picture, RGB."),
                io.Int.Output(display_name="width", tooltip="Its width in pixels."),
                io.Int.Output(display_name="height", tooltip="Its height in pixels."),
                io.Mask.Output(
                    display_name="mask", tooltip="The resized mask; without one, all of the picture but its padding."
                ),
                Placement.Output(
                    display_name="placement", tooltip="What was cut, padded and resized, for UniPic2 Paste Back."
                ),
            ],
        )

    @classmethod
    def run(cls, image, longer_edge, multiple, fit=FITS[0], mask=None) -> io.NodeOutput:
        if longer_edge < multiple:
            raise InputError(
                f"{cls.NAME}, longer_edge", found=longer_edge, expected=f"at least multiple, {multiple} pixels"
            )
        image, placement = pictures.resize_for_editing(image, longer_edge, multiple, f"{cls.NAME}, image", fit)
        mask = torch.ones(1, *placement.original[::-1]) if mask is None else mask
        return io.NodeOutput(image, *placement.size, pictures.resize_mask(mask, placement), placement)


class UniPic2PasteBack(_Node):
    """Bring an edit onto the full-size picture."""

    NAME = "UniPic2 Paste Back"

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="UniPic2PasteBack",
            display_name=cls.NAME,
            category=CATEGORY,
            description=(
                "Put an edit back onto the original picture at the original's size, exactly where UniPic2 Edit Image "
                "Size took it from. With a mask only that region and its fading border change; the rest keeps every "
                "pixel."
            ),
            inputs=[
                io.Image.Input(
                    "image", tooltip="The edit, as drawn or enlarged by an upscaler. A batch gives as many results."
                ),
                io.Image.Input("original", tooltip="The picture that UniPic2 Edit Image Size got."),
                Placement.Input("placement", tooltip="From UniPic2 Edit Image Size."),
                io.Int.Input(
                    "feather",
                    default=16,
                    min=0,
                    max=512,
                    tooltip="Pixels of the original over which the edit fades out: around a mask, at cropped edges.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the original may change (1 edit, 0 original): a mask of it, or as it is drawn.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The original with the edit, at full size, RGB.")],
        )

    @classmethod
    def run(cls, image, original, placement, feather, mask=None) -> io.NodeOutput:
        return io.NodeOutput(pictures.paste_back(image, original, placement, mask, feather, cls.NAME))


class UniPic2Reference(_Node):
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
                "latent has its size. The model needs UniPic2 Enable Editing. A second one in a row adds another "
                "reference: experimental, as UniPic2 was trained with one."
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
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip=(
                        "For a local edit: only there (1) the picture may change. Nothing: all of it may. "
                        "DifferentialDiffusion reads it as well."
                    ),
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The instruction with the reference."),
                io.Conditioning.Output(display_name="negative", tooltip="The negative prompt with the reference."),
                io.Latent.Output(
                    display_name="latent",
                    tooltip="For the sampler: the picture's own, which denoise 1 hides, and the mask.",
                ),
            ],
        )

    @classmethod
    def run(cls, positive, negative, vae, image, mask=None) -> io.NodeOutput:
        latents = pictures.encode_reference(vae, image, cls.NAME)
        values = {"reference_latents": [latents]}
        # The picture's own also without a mask: full noise hides them, and stock nodes that add a mask need them.
        size = image.shape[2], image.shape[1]
        latent = {"samples": latents} if mask is None else pictures.masked(latents, mask, size, cls.NAME)
        return io.NodeOutput(
            node_helpers.conditioning_set_values(positive, values, append=True),
            node_helpers.conditioning_set_values(negative, values, append=True),
            latent,
        )


class UniPic2ConnectorLoader(_Node):
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
    def fingerprint_inputs(cls, connector, **_inputs):
        """Return what tells a connector that was exported anew."""
        return published.fingerprint(metaquery.available_connectors().get(connector))

    @classmethod
    def run(cls, connector) -> io.NodeOutput:
        connectors = metaquery.available_connectors()
        if connector not in connectors:
            raise InputError(
                f"{cls.NAME}, connector",
                found=repr(connector),
                expected=" or ".join(map(repr, connectors)) or "a file",
                remedy="Put the conditioner's safetensors file into models/model_patches and press R to refresh.",
            )
        return io.NodeOutput(metaquery.load_connector(connectors[connector]))


class UniPic2MetaQueryEncode(_Node):
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
                    options=[metaquery.AUTO, *POSITIONS],
                    default=metaquery.AUTO,
                    tooltip=(
                        "How the picture's tokens are numbered: auto as the connector was trained, 1d as the "
                        "published model was run, mrope by rows and columns."
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
    def run(cls, clip, connector, prompt, negative_prompt, positions, image=None) -> io.NodeOutput:
        prompts = (prompt, negative_prompt)
        return io.NodeOutput(*metaquery.encode(clip, connector, prompts, image, positions, cls.NAME))


class UniPic2Understand(_Node):
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
    def run(cls, clip, question, lm_head, max_length, temperature, seed, image=None) -> io.NodeOutput:
        sampling = {"do_sample": temperature > 0, "temperature": temperature, "top_k": 50, "top_p": 0.9, "seed": seed}
        return io.NodeOutput(metaquery.answer(clip, question, image, lm_head, max_length, sampling, cls.NAME))


NODES = [
    UniPic2Loader,
    UniPic2MicroLoader,
    UniPic2EnableEditing,
    UniPic2TextEncode,
    UniPic2EditImageSize,
    UniPic2Reference,
    UniPic2PasteBack,
    UniPic2ConnectorLoader,
    UniPic2MetaQueryEncode,
    UniPic2Understand,
]
"""In menu order."""
