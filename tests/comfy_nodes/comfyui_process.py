"""Runs inside ComfyUI's own Python: load the pack as ComfyUI does, run every case, write what came out.

    python comfyui_process.py COMFYUI_ROOT PACK MODELS_FOLDER WORK_FOLDER

Reads `inputs.safetensors` and `prompts.json` from WORK_FOLDER, writes `outputs.safetensors` and `report.json`.
The tests beside this file compare them with the trainer's models; nothing is judged here.
"""

import asyncio
import copy
import importlib.util
import inspect
import json
import logging
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

ROOT, PACK, MODELS, WORK = map(Path, sys.argv[1:5])
sys.path.insert(0, str(ROOT))
sys.argv = ["main.py", "--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.clip_vision  # noqa: E402
import comfy.controlnet  # noqa: E402
import comfy.hooks  # noqa: E402
import comfy.lora  # noqa: E402
import comfy.model_management as mm  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.supported_models  # noqa: E402
import comfy.text_encoders.llama  # noqa: E402
import comfy.text_encoders.qwen_vl  # noqa: E402
import comfy.text_encoders.sd3_clip as sd3_clip  # noqa: E402
import folder_paths  # noqa: E402
import nodes  # noqa: E402
import torch  # noqa: E402
from comfy.patcher_extension import CallbacksMP, WrappersMP  # noqa: E402
from comfy.supported_models_base import ClipTarget  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

INPUTS = load_file(WORK / "inputs.safetensors")
PROMPTS = json.loads((WORK / "prompts.json").read_text())
METAQUERY_PROMPTS = json.loads((WORK / "metaquery_prompts.json").read_text())
CASES = sorted({key.rsplit(".", 1)[0] for key in INPUTS if key.endswith(".reference")})
STEPS, CFG, SEED = 20, 3.0, 7
TIED = "none (tied to the embedding)"
EDIT_NEGATIVE = json.loads((WORK / "edit_negative.json").read_text())

outputs: dict[str, torch.Tensor] = {}
report: dict = {}


def node(name, **arguments):
    """Run a node and return its outputs; some of ComfyUI's own became V3 nodes later."""
    found = nodes.NODE_CLASS_MAPPINGS[name]
    if not hasattr(found, "execute"):
        return getattr(found(), found.FUNCTION)(**arguments)
    return found.execute(**arguments).args


def sample(model, conds, latent):
    """Return the latents that a stock KSampler draws, with the values of `test_ksampler_equals_the_pipeline`."""
    return nodes.KSampler().sample(model, SEED, STEPS, CFG, "euler", "normal", *conds, latent)[0]["samples"]


def region():
    """Return a MASK of part of a picture of 96x64 pixels: latents 2 to 5 down, 4 to 7 across."""
    mask = torch.zeros(1, 64, 96)
    mask[:, 16:48, 32:64] = 1
    return mask


def loaded(model):
    """Load a MODEL with its patches and return ComfyUI's transformer."""
    mm.unload_all_models()
    mm.load_models_gpu([model])
    return model.model.diffusion_model


def predict(model, case, reference, batch=None, **options):
    return forward_of(loaded(model), case, reference, batch, **options)


def forward_of(transformer, case, reference, batch=None, **options):
    data = {key: INPUTS[f"{case}.{key}"][:batch] for key in ("x", "timestep", "context", "pooled", "reference")}
    extra = {"ref_latents": [data["reference"]]} if reference else {}
    return transformer(data["x"], data["timestep"], context=data["context"], y=data["pooled"], **extra, **options)


def load_pack():
    for path in (
        "nodes_sd3.py",
        "nodes_easycache.py",
        "nodes_preview_any.py",
        "nodes_string.py",
        "nodes_differential_diffusion.py",
        "nodes_hooks.py",
        "nodes_context_windows.py",
        "nodes_custom_sampler.py",
        "nodes_perpneg.py",
        "nodes_model_merging.py",
    ):  # stock nodes that the workflows and cases use
        asyncio.run(nodes.load_custom_node(str(ROOT / "comfy_extras" / path), module_parent="comfy_extras"))
    folder_paths.add_model_folder_path("unipic2", str(MODELS))
    modules, before = set(sys.modules), set(nodes.NODE_CLASS_MAPPINGS)
    report["loaded"] = asyncio.run(nodes.load_custom_node(str(PACK)))
    report["new_modules"] = sorted(set(sys.modules) - modules)
    report["nodes"] = [name for name in nodes.NODE_CLASS_MAPPINGS if name not in before]
    report["folders"] = folder_paths.get_folder_paths("unipic2")


def object_info():
    """What `/object_info` says of the nodes in the workflows."""
    names = ["KSampler", "LoadImage", "SaveImage", "VAEDecode", "VAELoader", "UNETLoader", "EmptySD3LatentImage",
             "TripleCLIPLoader", "CLIPLoader", "PreviewAny", "StringConcatenate", "LoraLoaderModelOnly", "ImageBatch",
             "DifferentialDiffusion", "EasyCache", "SkipLayerGuidanceSD3"]  # fmt: skip
    for name in [*names, *report["nodes"]]:
        cls = nodes.NODE_CLASS_MAPPINGS[name]
        if hasattr(cls, "GET_NODE_INFO_V1"):
            info = cls.GET_NODE_INFO_V1()
        else:
            types = cls.INPUT_TYPES()
            info = {
                "input": types,
                "input_order": {kind: list(inputs) for kind, inputs in types.items()},
                "output": cls.RETURN_TYPES,
                "output_name": getattr(cls, "RETURN_NAMES", cls.RETURN_TYPES),
                "output_node": getattr(cls, "OUTPUT_NODE", False),
            }
        report.setdefault("object_info", {})[name] = info


def forward(model, editing):
    for case in CASES:
        outputs[f"forward.{case}.stock"] = predict(model, case, reference=False)
        outputs[f"forward.{case}.t2i"] = predict(editing, case, reference=False)
        outputs[f"forward.{case}.edit"] = predict(editing, case, reference=True)
    # The MODEL that was patched is the stock one again, and patching twice is patching once.
    outputs["forward.stock_again"] = predict(model, CASES[0], reference=False)
    (twice,) = node("UniPic2EnableEditing", model=editing)
    outputs["forward.twice"] = predict(twice, CASES[0], reference=True)


def text(clip):
    for name, prompt in PROMPTS.items():
        positive, negative = node("UniPic2TextEncode", clip=clip, prompt=prompt, negative_prompt="")
        outputs[f"text.{name}.states"], outputs[f"text.{name}.pooled"] = unpack(positive)
        outputs[f"text.{name}.negative"] = unpack(negative)[0]
        (stock,) = nodes.CLIPTextEncode().encode(clip, prompt)
        outputs[f"text.{name}.stock_states"], outputs[f"text.{name}.stock_pooled"] = unpack(stock)
    weighted = "a (red:1.3) circle"
    outputs["text.weighted"] = unpack(node("UniPic2TextEncode", clip=clip, prompt=weighted, negative_prompt="")[0])[0]
    outputs["text.weighted_stock"] = unpack(nodes.CLIPTextEncode().encode(clip, weighted)[0])[0]


def unpack(conditioning):
    ((states, values),) = conditioning
    return states.clone(), values["pooled_output"].clone()


def sd3_text():
    """The real SD3 tokenizers in front of narrow, one-layer encoders; the tokens that reach them are kept."""
    small = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 1}
    # T5's width stays 4096, which SD3's text encoder pads CLIP to.
    t5 = {"num_layers": 1, "d_model": 4096, "d_ff": 16, "d_kv": 16, "num_heads": 1}
    options = {"clip_l_model_config": small, "clip_g_model_config": small, "t5xxl_model_config": t5}
    options["dtype"] = torch.float16
    clip = comfy.sd.CLIP(ClipTarget(sd3_clip.SD3Tokenizer, sd3_clip.sd3_clip()), model_options=options)
    for parameter in clip.cond_stage_model.parameters():
        parameter.zero_()
    encode, seen = clip.cond_stage_model.encode_token_weights, []

    def recording(tokens):
        seen.append({key: [[token for token, _ in chunk] for chunk in chunks] for key, chunks in tokens.items()})
        return encode(tokens)

    clip.cond_stage_model.encode_token_weights = recording
    for name in ("short", "empty", "long"):
        positive, negative = node("UniPic2TextEncode", clip=clip, prompt=PROMPTS[name], negative_prompt="blurry")
        report[f"sd3_tokens.{name}"] = seen[-2]
        report[f"sd3_shapes.{name}"] = [list(part[0][0].shape) for part in (positive, negative)]
    for task in ("text-to-image", "edit"):
        node("UniPic2TextEncode", clip=clip, prompt="", negative_prompt="", task=task)
        report[f"sd3_tokens.{task}"] = seen[-2:]
    (default,) = nodes.CLIPTextEncode().encode(clip, EDIT_NEGATIVE)
    report["sd3_tokens.edit_negative"] = seen[-1]
    report["sd3_option_left_behind"] = clip.tokenizer_options


def vae_and_latents(model, vae):
    image = INPUTS["image"]
    latents = vae.encode(image)
    outputs["vae.latents"] = latents
    outputs["vae.model_latents"] = model.model.process_latent_in(latents)
    outputs["vae.decoded"] = vae.decode(model.model.process_latent_out(INPUTS["latents"]))


def sampling(model, clip, vae):
    positive, negative = node("UniPic2TextEncode", clip=clip, prompt="make it blue", negative_prompt="a circle")
    batches = []

    def count(executor, x, *args, **kwargs):
        batches.append(x.shape[0])
        return executor(x, *args, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", count)
    for name, image in (("t2i", None), ("edit", INPUTS["image"][:1]), ("edit_batch", INPUTS["image"])):
        latent = {"samples": torch.zeros(1, 16, 8, 12)}
        conds = (positive, negative)
        if image is not None:
            *conds, latent = node("UniPic2Reference", positive=positive, negative=negative, vae=vae, image=image)
        batches.clear()
        sampled = sample(model, conds, latent)
        outputs[f"sampling.{name}.noise"] = comfy.sample.prepare_noise(latent["samples"], SEED)
        outputs[f"sampling.{name}.latents"] = model.model.process_latent_in(sampled)
        report[f"sampling.{name}.batches"] = list(batches)
    *conds, latent = node("UniPic2Reference", positive=positive, negative=negative, vae=vae, image=INPUTS["image"])
    report["reference_keys"] = [len(part[0][1]["reference_latents"]) for part in conds]
    report["input_keys"] = ["reference_latents" in part[0][1] for part in (positive, negative)]
    outputs["reference"], outputs["reference_latent"] = conds[0][0][1]["reference_latents"][0], latent["samples"]
    report["reference_latent_keys"] = list(latent)
    for name, values in (("", {}), ("_differential", {"strength": 1.0})):
        *conds, local = node("UniPic2Reference", positive=positive, negative=negative, vae=vae,
                             image=INPUTS["image"][:1], mask=region())  # fmt: skip
        target = node("DifferentialDiffusion", model=model, **values)[0] if values else model
        outputs[f"sampling.local{name}"] = sample(target, conds, local)
    local_masks(model, positive, negative, vae)
    skip_layer_guidance(model, conds)
    context_windows(model, positive, negative, vae)
    # One picture: ComfyUI 0.3.64's EasyCache cannot take more.
    *conds, latent = node("UniPic2Reference", positive=positive, negative=negative, vae=vae, image=INPUTS["image"][:1])
    easycache(model, conds, latent)
    lazycache(model, conds, latent)
    stock_mask(model, conds, latent)
    control_object(model, conds, latent)
    two_references(model, conds, vae)
    guiders(model, conds, latent)
    inpaint_conditioning(model, conds, vae)
    interrupted(model, conds, latent)


def local_masks(model, positive, negative, vae):
    """A mask of all there is, and a thin stroke on a picture of another size."""
    reference = {"positive": positive, "negative": negative, "vae": vae, "image": INPUTS["image"][:1]}
    *conds, local = node("UniPic2Reference", **reference, mask=torch.ones(1, 64, 96))
    outputs["sampling.local_all"] = model.model.process_latent_in(sample(model, conds, local))
    stroke = torch.zeros(1, 331, 503)
    stroke[:, 100:103] = 1
    tall = torch.ones(1, 96, 64)
    with warnings_told() as told:
        node("UniPic2Reference", **reference, mask=tall)
        node("UniPic2Reference", **reference, mask=stroke)
    report["told.mask"] = [text for text in told if "mask" in text]
    outputs["mask.stroke"] = node("UniPic2Reference", **reference, mask=stroke)[2]["noise_mask"]


def context_windows(model, positive, negative, vae):
    """Edits in windows of the batch and of the width: each with its own reference, or its part of it."""
    found = nodes.NODE_CLASS_MAPPINGS["ContextWindowsManual"]
    seen = []

    def note(executor, x, *args, **kwargs):
        seen.append((x.shape[-1], kwargs["ref_latents"][0][:1].clone()))
        return executor(x, *args, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "note", note)
    values = {"context_overlap": 0, "context_schedule": "standard_static", "context_stride": 1, "closed_loop": False,
              "fuse_method": "pyramid", "freenoise": False}  # fmt: skip
    if "causal_window_fix" in inspect.signature(found.execute).parameters:
        values["causal_window_fix"] = False
    for name, dim, length, pictures in (("batch", 0, 1, 2), ("width", 3, 6, 1)):
        image = INPUTS["image"][:pictures]
        *conds, latent = node("UniPic2Reference", positive=positive, negative=negative, vae=vae, image=image)
        (windowed,) = node("ContextWindowsManual", model=model, context_length=length, dim=dim, **values)
        seen.clear()
        try:
            sampled = sample(windowed, conds, latent)
        except Exception as error:
            report[f"windows.{name}"] = f"{type(error).__name__}: {error}"
            continue
        report[f"windows.{name}"] = [width for width, _ in seen[:2]]
        outputs[f"windows.{name}"] = model.model.process_latent_in(sampled)
        outputs[f"windows.{name}.seen"] = torch.cat([reference for _, reference in seen[:2]], dim=dim)
        outputs[f"windows.{name}.references"] = model.model.process_latent_in(vae.encode(image))


def skip_layer_guidance(model, conds):
    """An edit with the stock node, which leaves a block out in a third forward; without it, and with none of it."""
    latent = {"samples": torch.zeros(1, 16, 8, 12)}
    slg = {"layers": "1", "scale": 3.0, "start_percent": 0.0, "end_percent": 1.0}
    (skipping,) = node("SkipLayerGuidanceSD3", model=model, **slg)
    (nothing,) = node("SkipLayerGuidanceSD3", model=model, **{**slg, "scale": 0.0})
    for name, target in (("plain", model), ("nothing", nothing)):
        outputs[f"sampling.slg_{name}"] = sample(target, conds, latent)
    skipped, batches = [], report["sampling.edit.batches"]
    second = model.model.diffusion_model.joint_blocks[1].register_forward_hook(lambda *_: skipped.append(1))
    sampled = sample(skipping, conds, latent)
    second.remove()
    outputs["sampling.slg"] = sampled
    report["slg_runs"] = [len(skipped), len(batches)]


def preview(model, vae):
    """A preview through the micro VAE's decoder, put where ComfyUI looks for SD3's TAESD."""
    import latent_preview

    folder = WORK / "vae_approx"
    folder.mkdir()
    folder_paths.add_model_folder_path("vae_approx", str(folder))
    prefix, weights = "taesd_decoder.", vae.first_stage_model.state_dict()
    decoder = {k.removeprefix(prefix): v.contiguous() for k, v in weights.items() if k.startswith(prefix)}
    save_file(decoder, folder / "taesd3_decoder.safetensors")
    latent_preview.args.preview_method = latent_preview.LatentPreviewMethod.TAESD
    previewer = latent_preview.get_previewer(torch.device("cpu"), model.model.latent_format)
    _, image, _ = previewer.decode_latent_to_preview_image("JPEG", INPUTS["latents"][:1])
    report["preview"] = [type(previewer).__name__, *image.size]
    seen = []
    comfy.utils.set_progress_bar_global_hook(lambda value, total, preview, **_: seen.append((value, total, preview)))
    conds = [
        [torch.zeros(1, 4, 128), {"pooled_output": torch.zeros(1, 128), "reference_latents": [INPUTS["latents"][:1]]}]
    ]
    nodes.KSampler().sample(model, 0, 3, CFG, "euler", "normal", conds, conds, {"samples": INPUTS["latents"][:1]})
    comfy.utils.set_progress_bar_global_hook(None)
    report["previews"] = [[value, total, *preview[1].size] for value, total, preview in seen]
    latent_preview.args.preview_method = latent_preview.LatentPreviewMethod.NoPreviews


def easycache(model, conds, latent):
    """Count how often the transformer's blocks run with the stock EasyCache node."""
    (cached,) = node("EasyCache", model=model, reuse_threshold=3.0, start_percent=0.0, end_percent=1.0, verbose=False)
    runs = []
    hook = model.model.diffusion_model.joint_blocks[0].register_forward_hook(lambda *_: runs.append(1))
    sample(cached, conds, latent)
    hook.remove()
    report["easycache_runs"] = len(runs)
    (exact,) = node("EasyCache", model=model, reuse_threshold=0.0, start_percent=0.0, end_percent=1.0, verbose=False)
    outputs["sampling.easycache_exact"] = model.model.process_latent_in(sample(exact, conds, latent))


def lazycache(model, conds, latent):
    """The simpler stock node, which wraps the whole model: in steps that it leaves out nothing runs."""
    runs = []
    hook = model.model.diffusion_model.joint_blocks[0].register_forward_hook(lambda *_: runs.append(1))
    for name, threshold in (("saves", 3.0), ("exact", 0.0)):
        values = {"reuse_threshold": threshold, "start_percent": 0.0, "end_percent": 1.0, "verbose": False}
        (cached,) = node("LazyCache", model=model, **values)
        runs.clear()
        sampled = sample(cached, conds, latent)
        report[f"lazycache_runs.{name}"] = len(runs)
        outputs[f"sampling.lazycache_{name}"] = model.model.process_latent_in(sampled)
    hook.remove()


def guiders(model, conds, latent):
    """Stock guiders of three prompts, with values at which they are what KSampler does with two."""
    positive, negative = conds
    (dual,) = node("DualCFGGuider", model=model, cond1=positive, cond2=positive, negative=negative, cfg_conds=1.5,
                   cfg_cond2_negative=CFG, style="regular")  # fmt: skip
    (perpendicular,) = node("PerpNegGuider", model=model, positive=positive, negative=negative,
                            empty_conditioning=negative, cfg=CFG, neg_scale=1.0)  # fmt: skip
    (sampler,) = node("KSamplerSelect", sampler_name="euler")
    (sigmas,) = node("BasicScheduler", model=model, scheduler="normal", steps=STEPS, denoise=1.0)
    (noise,) = node("RandomNoise", noise_seed=SEED)
    for name, guider in (("dual", dual), ("perpendicular", perpendicular)):
        sampled, _ = node("SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas,
                          latent_image=latent)  # fmt: skip
        outputs[f"sampling.guider_{name}"] = model.model.process_latent_in(sampled["samples"])


def stock_mask(model, conds, latent):
    """The stock node that sets a mask, behind UniPic2 Reference without one."""
    (local,) = nodes.SetLatentNoiseMask().set_mask(latent, region())
    outputs["sampling.stock_mask"] = sample(model, conds, local)


class Residuals(comfy.controlnet.ControlBase):
    """A ControlNet that adds the same to every noisy token behind each block: a ramp, as norms take a constant out."""

    def __init__(self, value):
        super().__init__()
        self.value, self.calls = value, []

    def copy(self):
        return self

    def get_control(self, x_noisy, *_args):
        tokens = x_noisy.shape[-2] * x_noisy.shape[-1] // 4
        self.calls.append(tokens)
        residual = self.strength * self.value * torch.linspace(-1, 1, 192).expand(len(x_noisy), tokens, -1)
        return {"input": [], "middle": [], "output": [residual] * 2}


def control_object(model, conds, latent):
    """An edit with the stock Apply ControlNet node: one that adds nothing, and one that does."""
    for name, value in (("nothing", 0.0), ("something", 0.3)):
        net = Residuals(value)
        applied = nodes.ControlNetApplyAdvanced().apply_controlnet(*conds, net, INPUTS["image"][:1], 1.0, 0.0, 1.0)
        outputs[f"sampling.control_{name}"] = model.model.process_latent_in(sample(model, applied, latent))
        report[f"control_{name}"] = sorted(set(net.calls))


def two_references(model, conds, vae):
    """A second UniPic2 Reference, of another size, behind the first."""
    square = INPUTS["image"][:1, :, 16:80]
    *both, latent = node("UniPic2Reference", positive=conds[0], negative=conds[1], vae=vae, image=square)
    report["two_references"] = [[list(r.shape[-2:]) for r in part[0][1]["reference_latents"]] for part in both]
    outputs["sampling.two_references"] = sample(model, both, latent)


def inpaint_conditioning(model, conds, vae):
    """Stock InpaintModelConditioning behind UniPic2 Reference: the mask alone counts, SD3 has no input for more."""
    *conds, latent = nodes.InpaintModelConditioning().encode(*conds, INPUTS["image"][:1], vae, region())
    outputs["sampling.inpaint"] = sample(model, conds, latent)


def interrupted(model, conds, latent):
    """Cancel in the third step, then draw again."""
    seen = []

    def cancel(executor, *args, **kwargs):
        seen.append(1)
        if len(seen) == 3:
            mm.interrupt_current_processing()
        mm.throw_exception_if_processing_interrupted()
        return executor(*args, **kwargs)

    stopped = model.clone()
    stopped.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "cancel", cancel)
    try:
        sample(stopped, conds, latent)
        report["interrupted"] = "no"
    except mm.InterruptProcessingException:
        report["interrupted"] = len(seen)
    outputs["sampling.after_interrupt"] = model.model.process_latent_in(sample(model, conds, latent))


def compiled(editing):
    """What TorchCompileModel does, but for machine code, whose compiler is not everywhere: traced graphs are run."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    graphs = []

    def note(graph, inputs):
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    target = editing.clone()
    set_torch_compile_wrapper(model=target, backend=note)
    latent, reference = INPUTS["latents"][:1], INPUTS["latents"][1:]
    values = {"pooled_output": torch.ones(1, 128), "reference_latents": [reference]}
    conds = [[torch.ones(1, 4, 128), values]]
    for name, model in (("plain", editing), ("compiled", target)):
        args = (model, SEED, 2, CFG, "euler", "normal", conds, [[torch.zeros(1, 4, 128), values]])
        (sampled,) = nodes.KSampler().sample(*args, {"samples": torch.zeros_like(latent)})
        outputs[f"compile.{name}"] = sampled["samples"]
    report["compiled_nodes"] = sum(graphs)


def merging(model, editing):
    """Two models by ModelMergeSimple, saved by ModelSave, loaded by the one-click loader."""
    other = model.clone()
    key = "diffusion_model.joint_blocks.1.x_block.attn.qkv.weight"
    change = torch.randn(comfy.utils.get_attr(model.model, key).shape, generator=torch.Generator().manual_seed(9))
    other.add_patches({key: (0.1 * change,)})
    (half,) = nodes.NODE_CLASS_MAPPINGS["ModelMergeSimple"]().merge(editing, other, 0.5)
    outputs["merge.half"] = predict(half, "96x64x1", reference=True)
    direct = editing.clone()
    direct.add_patches({key: (0.05 * change,)})
    outputs["merge.direct"] = predict(direct, "96x64x1", reference=True)
    folder = WORK / "diffusion_models"
    saver = nodes.NODE_CLASS_MAPPINGS["ModelSave"]()
    saver.output_dir = str(folder)
    saver.save(half, "merged")
    (file,) = folder.glob("merged*.safetensors")
    found, _ = node("UniPic2Loader", model=file.name, weight_dtype="default")
    outputs["merge.saved"] = predict(found, "96x64x1", reference=True)


def in_place(editing):
    """A wrapper that writes into its input, as EasyCache does; in float32 that was the sampler's."""

    def write(executor, x, *args, **kwargs):
        x += 1
        return executor(x, *args, **kwargs)

    options = {"wrappers": {WrappersMP.DIFFUSION_MODEL: {"test": [write]}}}
    case, before = CASES[0], INPUTS[f"{CASES[0]}.x"].clone()
    predict(editing, case, reference=True, transformer_options=options)
    report["input_left_alone"] = bool(torch.equal(INPUTS[f"{case}.x"], before))


def lora(model, editing):
    """A LoRA through ComfyUI's loader, before and behind Enable Editing."""
    file = load_file(WORK / "lora.safetensors")

    folder_paths.add_model_folder_path("loras", str(WORK))

    def apply(target):
        return nodes.LoraLoaderModelOnly().load_lora_model_only(target, "lora.safetensors", 1.0)[0]

    case = "96x64x1"
    outputs["lora.behind"] = predict(apply(editing), case, reference=True)
    outputs["lora.before"] = predict(node("UniPic2EnableEditing", model=apply(model))[0], case, reference=True)
    known = next(key for key in file if "transformer_blocks.0." in key and key.endswith(".lora_A.weight"))
    file |= {known.replace("transformer_blocks.0.", "transformer_blocks.99."): file[known]}
    with warnings_told() as told:
        other, _ = comfy.sd.load_lora_for_models(editing, None, file, 1.0, 0.0)
        outputs["lora.unknown"] = predict(other, case, reference=True)
    report["lora_unknown"] = told
    low_vram(apply(editing))


@contextmanager
def warnings_told():
    """Yield a list of what ComfyUI's log is warned of meanwhile."""
    told = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    try:
        yield told
    finally:
        logging.getLogger().removeHandler(handler)


def silent_faults(model, clip, vae):
    """What would give a worse picture without a word."""
    (editing,) = node("UniPic2EnableEditing", model=model)
    positive, negative = node("UniPic2TextEncode", clip=clip, prompt="make it blue", negative_prompt="")
    edit, *_ = node("UniPic2Reference", positive=positive, negative=negative, vae=vae, image=INPUTS["image"][:1])
    latent = {"samples": torch.zeros(1, 16, 8, 12)}
    for name, conds in (("half", (edit, negative)), ("none", (positive, negative)), ("both", (edit, edit))):
        with warnings_told() as told:
            nodes.KSampler().sample(editing, 0, 1, 1.0, "euler", "normal", *conds, latent)
        report[f"told.{name}"] = [text for text in told if "no reference" in text]
    for name in ("single", "shifted"):
        with warnings_told() as told:
            node("UniPic2EnableEditing", model=comfy.sd.load_diffusion_model(str(WORK / f"{name}.safetensors")))
        report[f"told.{name}"] = [text for text in told if "shift" in text]
    (combined,) = nodes.ConditioningCombine().combine(edit, positive)
    with warnings_told() as told:
        nodes.KSampler().sample(editing, 0, 1, 1.0, "euler", "normal", combined, edit, latent)
    report["told.combined"] = [text for text in told if "has none" in text]
    small = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 1}
    target = ClipTarget(sd3_clip.SD3Tokenizer, sd3_clip.sd3_clip(t5=False, dtype_t5=None))
    clips = comfy.sd.CLIP(target, model_options={"clip_l_model_config": small, "clip_g_model_config": small})
    with warnings_told() as told:
        node("UniPic2TextEncode", clip=clips, prompt="a", negative_prompt="b")
    report["told.encoders"] = [text for text in told if "is loaded" in text]


def low_vram(model):
    """As with --lowvram, which --cpu excludes: most weights stay away, and get their LoRA, until they are used."""
    mm.unload_all_models()
    model.patch_model(device_to=torch.device("cpu"), lowvram_model_memory=200_000)
    layers = [m for m in model.model.diffusion_model.modules() if getattr(m, "comfy_cast_weights", False)]
    report["low_vram"] = [model.model.model_lowvram, len(layers)]
    outputs["lora.low_vram"] = forward_of(model.model.diffusion_model, "96x64x1", reference=True)
    model.unpatch_model(torch.device("cpu"))


def single_file():
    """An exported single file through Load Diffusion Model's own loader."""
    model = comfy.sd.load_diffusion_model(str(WORK / "single.safetensors"))
    outputs["single.edit"] = predict(node("UniPic2EnableEditing", model=model)[0], "96x64x1", reference=True)


def loader(model, vae):
    """The one-click loader on every form that a model comes in."""
    files = WORK / "diffusion_models"
    for kind in ("diffusion_models", "checkpoints"):
        folder_paths.add_model_folder_path(kind, str(files))
    shutil.copytree(Path(MODELS, "sharded"), files / "whole")
    weights = {key: tensor.contiguous() for key, tensor in model.model.diffusion_model.state_dict().items()}
    save_file(weights, files / "comfyui.safetensors")
    parts = {f"first_stage_model.{key}": tensor for key, tensor in vae.first_stage_model.state_dict().items()}
    checkpoint = {**{f"model.diffusion_model.{key}": tensor for key, tensor in weights.items()}, **parts}
    save_file({key: tensor.contiguous() for key, tensor in checkpoint.items()}, files / "checkpoint.safetensors")
    for file in ("lora", "single", "shifted", "unshifted", "dynamic"):
        file = f"{file}.safetensors"
        (files / file).write_bytes((WORK / file).read_bytes())
    before = [file.read_bytes() for file in sorted(Path(MODELS, "sharded").rglob("*.safetensors"))]
    offered = nodes.NODE_CLASS_MAPPINGS["UniPic2Loader"].INPUT_TYPES()["required"]["model"][1]["options"]
    report["loader_whole"] = sorted(name for name in offered if "whole" in name)
    for name in ("random", "sharded", "sharded", "single", "comfyui", "checkpoint", "whole"):
        chosen = name if name in ("random", "sharded", "whole") else f"{name}.safetensors"
        found, own = node("UniPic2Loader", model=chosen, weight_dtype="default")
        outputs[f"loader.{name}"] = predict(found, "96x64x1", reference=True)
        if name in ("sharded", "checkpoint"):
            outputs[f"loader.{name}.vae"] = own.encode(INPUTS["image"])
    after = [file.read_bytes() for file in sorted(Path(MODELS, "sharded").rglob("*.safetensors"))]
    stock = {
        "unet": nodes.UNETLoader().load_unet("single.safetensors", "default")[0],
        "checkpoint": nodes.CheckpointLoaderSimple().load_checkpoint("checkpoint.safetensors")[0],
    }
    for name, found in stock.items():
        outputs[f"stock.{name}"] = predict(node("UniPic2EnableEditing", model=found)[0], "96x64x1", reference=True)
    report["loader_left_files"] = len(before) > 3 and before == after
    small, _ = node("UniPic2Loader", model="single.safetensors", weight_dtype="fp8_e4m3fn")
    report["loader_fp8"] = str(small.model.diffusion_model.joint_blocks[0].x_block.attn.qkv.weight.dtype)
    outputs["loader.fp8"] = predict(small, "96x64x1", reference=True)
    for name in ("single", "comfyui"):  # files that hold float8, as people share them
        tensors = load_file(files / f"{name}.safetensors")
        save_file({k: t.to(torch.float8_e4m3fn) for k, t in tensors.items()}, files / f"{name}8.safetensors")
        found, _ = node("UniPic2Loader", model=f"{name}8.safetensors", weight_dtype="default")
        outputs[f"loader.{name}8"] = predict(found, "96x64x1", reference=True)
        found = nodes.UNETLoader().load_unet(f"{name}8.safetensors", "default")[0]
        outputs[f"stock.{name}8"] = predict(node("UniPic2EnableEditing", model=found)[0], "96x64x1", reference=True)
    shifts = [("UniPic2Loader", {"model": f"{name}.safetensors"}) for name in ("single", "shifted", "dynamic")]
    scheduler = Path(MODELS, "sharded", "scheduler", "scheduler_config.json")
    kept = scheduler.read_text()
    for config in ({"shift": 2.0}, {"shift": 2.0, "use_dynamic_shifting": True}, {"shift": 3.0}):
        shifts.append(("UniPic2Loader", {"model": "sharded", "config": config}))
        shifts.append(("UniPic2MicroLoader", {"model": "sharded", "config": config}))
    report["shifts"] = []
    for name, arguments in shifts:
        if (config := arguments.pop("config", None)) is not None:
            scheduler.write_text(json.dumps({**json.loads(kept), **config}))
        if name == "UniPic2Loader":
            arguments["weight_dtype"] = "default"
        found = node(name, **arguments)[0].get_model_object("model_sampling")
        # Noise half way through the steps is what the shift is for.
        report["shifts"].append([found.shift, float(found.sigma(torch.tensor(500.0)))])
    scheduler.write_text(kept)
    collect({
        "loader_shift": lambda: node("UniPic2Loader", model="unshifted.safetensors", weight_dtype="default"),
        "loader_lora": lambda: node("UniPic2Loader", model="lora.safetensors", weight_dtype="default"),
        "loader_absent": lambda: node("UniPic2Loader", model="../random", weight_dtype="default"),
        "loader_no_vae": lambda: node("UniPic2Loader", model="single.safetensors", weight_dtype="default")[1].decode(
            torch.zeros(1, 16, 8, 8)
        ),
    })  # fmt: skip


def dynamic_vram():
    """Load with layers that have no weights before they are loaded, as ComfyUI's have by default on NVIDIA."""
    if importlib.util.find_spec("comfy.memory_management") is None:
        return
    import comfy.memory_management

    if not hasattr(comfy.memory_management, "aimdo_enabled"):
        return
    comfy.memory_management.aimdo_enabled = True
    try:
        model, clip, _ = node("UniPic2MicroLoader", model="random")
        _, qwen, _ = node("UniPic2MicroLoader", model="metaquery")
        (connector,) = node("UniPic2ConnectorLoader", connector="metaquery")
    finally:
        comfy.memory_management.aimdo_enabled = False
    outputs["dynamic.text"] = unpack(node("UniPic2TextEncode", clip=clip, prompt="x", negative_prompt="")[0])[0]
    outputs["dynamic.forward"] = predict(model, "64x64x1", reference=False)
    cond = node("UniPic2MetaQueryEncode", clip=qwen, connector=connector, prompt=METAQUERY_PROMPTS[0],
                negative_prompt="", positions="1d", image=INPUTS["vision.96x64"])[0]  # fmt: skip
    outputs["dynamic.metaquery"] = unpack(cond)[0]


def metaquery():
    """Every prompt against the next one as negative, with and without pictures, both ways to number them."""
    _, clip, _ = node("UniPic2MicroLoader", model="metaquery")
    (connector,) = node("UniPic2ConnectorLoader", connector="metaquery")
    report["connectors"] = [name for name in ("metaquery", "random") if name in connectors()]
    common = {"clip": clip, "connector": connector}
    outputs["metaquery.stock_picture_before"] = stock_picture(clip)
    pictures = {"none": None, **{k: v for k, v in INPUTS.items() if k.startswith("vision.")}}
    for i, prompt in enumerate(METAQUERY_PROMPTS):
        texts = {"prompt": prompt, "negative_prompt": METAQUERY_PROMPTS[i - 1]}
        for name, image in pictures.items():
            for positions in ("1d", "mrope"):
                conds = node("UniPic2MetaQueryEncode", **common, **texts, positions=positions, image=image)
                for side, cond in zip(("positive", "negative"), conds, strict=True):
                    at = f"metaquery.{i}.{name}.{positions}.{side}"
                    outputs[f"{at}.states"], outputs[f"{at}.pooled"] = unpack(cond)
    trained = connector.model.conditioner.config
    for written in ({"positions": "mrope"}, {"positions": "1d"}, {}):
        connector.model.conditioner.config = {k: v for k, v in trained.items() if k != "positions"} | written
        cond = node("UniPic2MetaQueryEncode", **common, prompt=METAQUERY_PROMPTS[0], negative_prompt="",
                    positions="auto", image=INPUTS["vision.64x64"])[0]  # fmt: skip
        outputs[f"metaquery.auto.{written.get('positions')}"] = unpack(cond)[0]
    connector.model.conditioner.config = trained
    question = {"question": METAQUERY_PROMPTS[0], "lm_head": TIED, "max_length": 6, "temperature": 0.0, "seed": 0}
    qwen, rope = comfy.text_encoders.qwen_vl, "qwen2vl_mrope_position_ids"
    report["generates"] = hasattr(qwen, rope)
    if report["generates"]:
        report["answers"] = {
            name: node("UniPic2Understand", clip=clip, image=image, **question)[0] for name, image in pictures.items()
        }
        output_layer(clip)
    kept = qwen.__dict__.pop(rope, None)  # as in a ComfyUI from before it
    collect({"no_generation": lambda: node("UniPic2Understand", clip=clip, image=None, **question)})
    if kept is not None:
        setattr(qwen, rope, kept)
    outputs["metaquery.stock_picture"] = stock_picture(clip)
    _, small, _ = node("UniPic2MicroLoader", model="fp8")
    cond = node("UniPic2MetaQueryEncode", clip=small, connector=connector, prompt="x", negative_prompt="",
                positions="1d", image=INPUTS["vision.64x64"])[0]  # fmt: skip
    outputs["metaquery.fp8"] = unpack(cond)[0]
    older_core(clip, common)
    lora_of_qwen(clip, connector)
    stock_qwen(connector)
    unseeing(connector)
    metaquery_errors(clip, connector)


def lora_of_qwen(clip, connector):
    """A LoRA of the language model by the stock loader, and what is left of it on the CLIP that it was loaded on."""
    _, patched = nodes.LoraLoader().load_lora(None, clip, "qwen_lora.safetensors", 0.0, 1.0)
    common = {"connector": connector, "prompt": METAQUERY_PROMPTS[0], "negative_prompt": "", "positions": "1d"}
    for name, chosen in (("with", patched), ("without", clip)):
        cond, _ = node("UniPic2MetaQueryEncode", clip=chosen, image=INPUTS["vision.96x64"], **common)
        outputs[f"metaquery.{name}_lora"] = unpack(cond)[0]


def stock_picture(clip):
    """A picture as ComfyUI's own nodes show it to a CLIP, with its own token."""
    image = {"type": "image", "data": INPUTS["vision.96x64"][:1], "original_type": "image"}
    return clip.encode_from_tokens({"unipic2_micro_qwen": [[(5, 1.0), (image, 1.0), (6, 1.0)]]}, return_pooled=True)[0]


def output_layer(clip):
    """Answers by the output layer of a file, and by the embedding again afterwards."""
    folder = WORK / "text_encoders"
    folder.mkdir()
    folder_paths.add_model_folder_path("text_encoders", str(folder))
    language_model = clip.cond_stage_model.unipic2_micro_qwen.transformer.model
    embedding = language_model.embed_tokens.weight.detach().float()
    save_file({"lm_head.weight": embedding.flip(0).contiguous()}, folder / "other.safetensors")
    save_file({"lm_head.weight": (embedding / 4).contiguous(), "lm_head.weight_scale": torch.tensor(4.0)},
              folder / "scaled.safetensors")  # fmt: skip
    save_file({"lm_head.weight": torch.zeros(3, 128)}, folder / "narrow.safetensors")
    save_file({"a": torch.zeros(1)}, folder / "none.safetensors")
    common = dict(clip=clip, question="what is it?", max_length=6, temperature=0.0, seed=0, image=None)
    for name in (TIED, "other.safetensors", TIED, "scaled.safetensors"):
        report.setdefault("by_head", []).append(node("UniPic2Understand", lm_head=name, **common)[0])
    report["head_left_behind"] = hasattr(language_model, "lm_head")
    warm = [node("UniPic2Understand", lm_head=TIED, **{**common, "temperature": 1.5, "seed": i})[0] for i in (1, 1, 2)]
    report["warm"] = warm
    collect({
        name: lambda name=name: node("UniPic2Understand", lm_head=f"{name}.safetensors", **common)
        for name in ("narrow", "none")
    })  # fmt: skip


def connectors():
    return nodes.NODE_CLASS_MAPPINGS["UniPic2ConnectorLoader"].INPUT_TYPES()["required"]["connector"][1]["options"]


def older_core(clip, common):
    """Vision tokens in the order of attention windows, as ComfyUI up to 0.3.x leaves them."""
    visual = clip.cond_stage_model.unipic2_micro_qwen.transformer.visual
    stock = visual.forward

    def unordered(*args, **kwargs):
        kept = []
        hook = visual.merger.register_forward_hook(lambda module, inputs, output: kept.append(output))
        stock(*args, **kwargs)
        hook.remove()
        return kept[0]

    visual.forward = unordered
    picture = INPUTS["vision.256x288"]
    cond = node("UniPic2MetaQueryEncode", **common, prompt=METAQUERY_PROMPTS[0], negative_prompt="", positions="1d",
                image=picture)[0]  # fmt: skip
    outputs["metaquery.older"] = unpack(cond)[0]
    visual.forward = stock


def stock_qwen(connector):
    """The CLIP of Load CLIP for Qwen-Image, its language model small, its tokenizer the real one."""
    import comfy.text_encoders.qwen_image as qwen_image

    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1,
             "num_key_value_heads": 1}  # fmt: skip
    target = ClipTarget(qwen_image.QwenImageTokenizer, qwen_image.te())
    # On the meta device at first: the vision encoder is the published one, and is not run here.
    clip = comfy.sd.CLIP(target, model_options={"qwen25_7b_model_config": sizes, "dtype": torch.float16})
    for parameter in clip.cond_stage_model.qwen25_7b.transformer.model.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    (cond, _) = node("UniPic2MetaQueryEncode", clip=clip, connector=connector, prompt="a red circle",
                     negative_prompt="", positions="1d", image=None)  # fmt: skip
    outputs["metaquery.stock"] = unpack(cond)[0]
    report["qwen_7b_lora_keys"] = list(comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {}))
    state = clip.cond_stage_model.qwen25_7b.transformer.model.state_dict()
    outputs.update({f"stock_qwen.{key}": tensor for key, tensor in state.items()})


def unseeing(connector):
    """Vision encoders as ComfyUI's loaders leave them where a file has no weights for them."""
    _, clip, _ = node("UniPic2MicroLoader", model="metaquery")
    visual = clip.patcher.model.unipic2_micro_qwen.transformer.visual
    qkv, norm = visual.blocks[0].attn.qkv, visual.merger.ln_q
    left = {
        "none": (qkv, None),
        "turned": (qkv, torch.zeros(qkv.weight.shape[::-1])),
        "zeros": (norm, torch.zeros_like(norm.weight)),
        "nan": (visual.blocks[1].norm2, torch.full_like(norm.weight, torch.nan)),
        "huge": (visual.blocks[2].norm1, torch.full_like(norm.weight, 1e30)),
    }
    texts = {"prompt": "", "negative_prompt": "", "positions": "1d"}
    picture = {"connector": connector, "image": INPUTS["image"], **texts}
    for name, (layer, values) in left.items():
        kept = layer.weight
        layer.weight = None if values is None else torch.nn.Parameter(values, requires_grad=False)
        collect({f"blind_{name}": lambda: node("UniPic2MetaQueryEncode", clip=clip, **picture)})
        layer.weight = kept
    if not hasattr(comfy.sd, "load_clip_model_patcher"):
        return  # a ComfyUI that does not note which file a CLIP is from
    # Load CLIP's own, from the file of a small language model; the vision encoder has its published size, no weights.
    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
             "num_key_value_heads": 4, "vocab_size": 8}  # fmt: skip
    state = comfy.text_encoders.llama.Qwen25_7BVLI(sizes, None, "meta", torch.nn).model.state_dict()
    file = WORK / "text_only.safetensors"
    save_file({f"model.{key}": torch.ones(t.shape, dtype=torch.float16) for key, t in state.items()}, file)
    kind, options = comfy.sd.CLIPType.QWEN_IMAGE, {"qwen25_7b_model_config": sizes}
    blind = comfy.sd.load_clip([str(file)], clip_type=kind, model_options=options)
    collect({"blind_file": lambda: node("UniPic2MetaQueryEncode", clip=blind, **picture)})


def hooked(clip, lora, *keyframes):
    """Return a CLIP with a LoRA by Set CLIP Hooks, scheduled by keyframes (start, strength); none is full strength."""
    hooks, schedule = comfy.hooks.create_hook_lora(lora, 1.0, 1.0), comfy.hooks.HookKeyframeGroup()
    for start, strength in keyframes:
        schedule.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
    hooks.set_keyframes_on_hooks(schedule)
    return node("SetClipHooks", clip=clip, apply_to_conds=True, schedule_clip=True, hooks=hooks)[0]


def clip_hooks():
    """Both text nodes behind Set CLIP Hooks, on CLIPs of their own."""
    _, clip, _ = node("UniPic2MicroLoader", model="random")
    layer = "unipic2_micro.transformer.text_model.encoder.layers.0.mlp.fc1"
    shape = clip.cond_stage_model.state_dict()[f"{layer}.weight"].shape
    change = 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(4))
    halves = hooked(clip, {f"text_encoders.{layer}.diff": change}, (0.0, 1.0), (0.5, 0.0))
    ours, _ = node("UniPic2TextEncode", clip=halves, prompt=PROMPTS["short"], negative_prompt="")
    (stock,) = nodes.CLIPTextEncode().encode(halves, PROMPTS["short"])
    for name, conds in (("ours", ours), ("stock", stock)):
        report[f"schedule.{name}"] = [[v.get("clip_start_percent"), v.get("clip_end_percent")] for _, v in conds]
        for i, (states, _) in enumerate(conds):
            outputs[f"schedule.{name}.{i}"] = states
    _, qwen, _ = node("UniPic2MicroLoader", model="metaquery")
    (connector,) = node("UniPic2ConnectorLoader", connector="metaquery")
    lora = load_file(WORK / "qwen_lora.safetensors")
    common = {"connector": connector, "prompt": METAQUERY_PROMPTS[0], "negative_prompt": "", "positions": "1d",
              "image": INPUTS["vision.96x64"]}  # fmt: skip
    for name, keyframes in (("without_keyframes", ()), ("of_one_strength", ((0.0, 1.0), (0.5, 1.0)))):
        cond, _ = node("UniPic2MetaQueryEncode", clip=hooked(qwen, lora, *keyframes), **common)
        outputs[f"hooks.{name}"] = unpack(cond)[0]
        report[f"hooks.{name}"] = "hooks" in cond[0][1]
    halves = hooked(qwen, lora, (0.0, 1.0), (0.5, 0.0))
    collect({"scheduled_hooks": lambda: node("UniPic2MetaQueryEncode", clip=halves, **common)})


def metaquery_errors(clip, connector):
    _, micro, _ = node("UniPic2MicroLoader", model="random")
    texts = {"prompt": "", "negative_prompt": "", "positions": "1d"}
    tokens = {"clip": clip, "connector": connector, **texts}
    wide = type(connector)(torch.nn.Module(), connector.load_device, connector.offload_device)
    wide.model.conditioner = torch.nn.Module()
    wide.model.conditioner.config = {**connector.model.conditioner.config, "llm_hidden_size": 3584}
    blind = copy.copy(clip)
    blind.patcher = SimpleNamespace(model=torch.nn.Module())
    blind.patcher.model.inner = torch.nn.Module()
    blind.patcher.model.inner.transformer = Blind()
    image = INPUTS["image"]
    attempts = {
        "no_qwen": lambda: node("UniPic2MetaQueryEncode", **{**tokens, "clip": None}),
        "other_clip": lambda: node("UniPic2MetaQueryEncode", **{**tokens, "clip": micro}),
        "other_width": lambda: node("UniPic2MetaQueryEncode", **{**tokens, "connector": wide}),
        "no_connector": lambda: node("UniPic2MetaQueryEncode", **{**tokens, "connector": None}),
        "blind": lambda: node("UniPic2MetaQueryEncode", **{**tokens, "clip": blind}, image=image),
        "odd_picture": lambda: node("UniPic2MetaQueryEncode", **tokens, image=image[:, :48]),
        "small_picture": lambda: node("UniPic2MetaQueryEncode", **tokens, image=image[:, :32, :32]),
        "unknown_connector": lambda: node("UniPic2ConnectorLoader", connector="absent"),
        "blind_answer": lambda: node(
            "UniPic2Understand", clip=blind, question="", lm_head=TIED, max_length=1, temperature=0.0, seed=0
        ),
        "qwen_as_text_encoder": lambda: node("UniPic2TextEncode", clip=clip, prompt="", negative_prompt=""),
    }
    collect(attempts)


class Blind(comfy.text_encoders.llama.Qwen25_3B):
    """ComfyUI's Qwen2.5 without vision, of the connector's width."""

    def __init__(self):
        torch.nn.Module.__init__(self)
        self.model = torch.nn.Module()
        self.model.embed_tokens = torch.nn.Embedding(1, 128)


def controlnet(editing):
    residuals = [INPUTS["control"][0], INPUTS["control"][1], None]
    outputs["control.edit"] = predict(editing, "96x64x1", reference=True, control={"output": list(residuals)})


def further_gpu(editing):
    """ComfyUI clones a patcher for each further GPU and puts a freshly loaded model into the clone."""
    other, _, _ = node("UniPic2MicroLoader", model="random")
    clone = editing.clone()
    clone.model = other.model
    for callback in editing.get_all_callbacks(CallbacksMP.ON_CLONE):
        callback(editing, clone)
    report["clone_runs_its_own_model"] = (
        clone.object_patches["diffusion_model.forward"].diffusion_model is other.model.diffusion_model
    )
    outputs["clone.edit"] = predict(clone, CASES[0], reference=True)


def memory(editing):
    """Bytes that ComfyUI reserves for a 512x512 picture with and without a reference of the same size."""
    loaded(editing)
    model, latent = editing.model, torch.zeros(1, 16, 64, 64)
    shapes = {key: [value] for key, value in model.extra_conds_shapes(reference_latents=[latent]).items()}
    report["memory"] = [model.memory_required(list(latent.shape), cond_shapes=s) for s in ({}, shapes)]
    asked, load = [], mm.load_models_gpu

    def load_models_gpu(models, memory_required=0, **options):
        asked.append(memory_required)
        return load(models, memory_required=memory_required, **options)

    mm.load_models_gpu = load_models_gpu
    one, two, first = INPUTS["latents"][:1], INPUTS["latents"], []
    for drawn, references in ((one, []), (one, [one]), (two, []), (two, [one]), (two, [two])):
        mm.unload_all_models()
        asked.clear()
        conds = [[torch.zeros(1, 4, 128), {"pooled_output": torch.zeros(1, 128), "reference_latents": references}]]
        latents = {"samples": torch.zeros_like(drawn)}
        nodes.KSampler().sample(editing, 0, 1, 1.0, "euler", "normal", conds, conds, latents)
        first.append(asked[0])
    mm.load_models_gpu = load
    report["memory_before_loading"] = first


def areas(editing):
    """The halves of a picture, each with its own part of the reference: as if each was a picture of its own."""
    latent = INPUTS["latents"][:1]
    height, width = latent.shape[-2:]
    loaded(editing)
    conds = editing.model.extra_conds(
        noise=latent, device=torch.device("cpu"), reference_latents=[latent], pooled_output=torch.zeros(1, 128),
        cross_attn=torch.zeros(1, 4, 128),
    )  # fmt: skip
    area = [height, width // 2, 0, width // 2]
    (seen,) = conds["ref_latents"].process_cond(batch_size=1, area=area).cond
    outputs["area.seen"], outputs["area.whole"] = seen, conds["ref_latents"].process_cond(batch_size=2).cond[0]
    outputs["area.reference"] = editing.model.process_latent_in(latent)


def reloading(model, clip, editing):
    """What ComfyUI does where weights cannot stay on the disk: it loads the model again, from the loader's files."""
    if not hasattr(model, "cached_patcher_init"):
        return
    one_click, _ = node("UniPic2Loader", model="single.safetensors", weight_dtype="default")
    for name, patcher in (("micro", editing), ("file", one_click)):
        load, arguments = patcher.cached_patcher_init
        patcher.is_dynamic = lambda: True
        clone = patcher.clone(disable_dynamic=True)
        assert clone.model is not patcher.model and type(clone) is comfy.model_patcher.ModelPatcher
        outputs[f"reloaded.{name}"] = predict(clone, "96x64x1", reference=True)
        del patcher.is_dynamic
    load, arguments = clip.patcher.cached_patcher_init
    again = load(*arguments, disable_dynamic=True).model.state_dict()
    report["reloaded_clip"] = all(torch.equal(v, again[k]) for k, v in clip.patcher.model.state_dict().items())


def errors(model, clip, vae):
    """Every refusal, as `type: message`."""
    cfg = comfy.supported_models.SD15(
        {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1],
         "channel_mult": [1], "num_heads": 1, "use_spatial_transformer": True, "transformer_depth": [0],
         "transformer_depth_output": [0, 0], "transformer_depth_middle": -1, "num_head_channels": -1,
         "context_dim": 32, "legacy": False, "adm_in_channels": None, "use_linear_in_transformer": False},
    )  # fmt: skip
    unet = comfy.model_patcher.ModelPatcher(cfg.get_model({}, ""), torch.device("cpu"), torch.device("cpu"))
    positive, negative = node("UniPic2TextEncode", clip=clip, prompt="", negative_prompt="")
    reference = {"positive": positive, "negative": negative, "vae": vae}
    four = comfy.sd.VAE(sd=comfy.taesd.taesd.TAESD(latent_channels=4).state_dict())
    size = {"longer_edge": 64, "multiple": 32}
    image = INPUTS["image"]
    attempts = {
        "architecture": lambda: node("UniPic2EnableEditing", model=unet),
        "odd_size": lambda: node("UniPic2Reference", **reference, image=image[:, :60, :90]),
        "no_vae": lambda: node("UniPic2Reference", **{**reference, "vae": None}, image=image),
        "wrong_vae": lambda: node("UniPic2Reference", **{**reference, "vae": four}, image=image),
        "empty_batch": lambda: node("UniPic2EditImageSize", image=image[:0], **size),
        "empty_picture": lambda: node("UniPic2EditImageSize", image=image[:, :, :0], **size),
        "two_channels": lambda: node("UniPic2EditImageSize", image=image[..., :2], **size),
        "short_edge": lambda: node("UniPic2EditImageSize", image=image, longer_edge=32, multiple=64),
        "no_clip": lambda: node("UniPic2TextEncode", clip=None, prompt="", negative_prompt=""),
        "wrong_clip": lambda: node("UniPic2TextEncode", clip=Flux(), prompt="", negative_prompt=""),
        "unknown_model": lambda: node("UniPic2MicroLoader", model="absent"),
        "empty_mask": lambda: node("UniPic2Reference", **reference, image=image, mask=torch.zeros(1, 64, 64)),
        "masks": lambda: node("UniPic2Reference", **reference, image=image, mask=torch.ones(3, 64, 96)),
        "wrong_reference": lambda: sample_with_reference(model, positive, negative),
        "too_large": lambda: sample_with_reference(model, positive, negative, (16, 64, 8)),
        "too_many": lambda: sample_with_reference(model, positive, negative, (16, 8, 8), 2),
    }
    for folder in ("truncated", "no_vae", "wrong_config", "wrong_tensors"):
        attempts[f"folder_{folder}"] = lambda folder=folder: node("UniPic2MicroLoader", model=folder)
    collect(attempts)


def collect(attempts):
    """Note what each attempt is refused with, as `type: message`."""
    for name, attempt in attempts.items():
        try:
            attempt()
            report.setdefault("errors", {})[name] = "no error"
        except Exception as error:
            report.setdefault("errors", {})[name] = f"{type(error).__name__}: {error}"


class Flux:
    """A text encoder of another family: ComfyUI's Flux tokenizer."""

    def __init__(self):
        import comfy.text_encoders.flux

        self.tokenizer = comfy.text_encoders.flux.FluxTokenizer()

    def clone(self):
        return self

    def set_tokenizer_option(self, *_):
        pass

    def tokenize(self, prompt, **options):
        return self.tokenizer.tokenize_with_weights(prompt, **options)


def sample_with_reference(model, positive, negative, shape=(4, 8, 8), count=1):
    (editing,) = node("UniPic2EnableEditing", model=model)
    values = {"reference_latents": [torch.zeros(count, *shape)]}
    conds = [[[part[0][0], {**part[0][1], **values}]] for part in (positive, negative)]
    latent = {"samples": torch.zeros(1, 16, 8, 8)}
    nodes.KSampler().sample(editing, 0, 1, 1.0, "euler", "normal", *conds, latent)


def pictures():
    ramp = torch.linspace(0, 1, 200).expand(1, 100, 200)[..., None]
    image, width, height, _, _ = node("UniPic2EditImageSize", image=ramp, longer_edge=64, multiple=32)
    outputs["size.grey"] = image.contiguous()
    report["size"] = [width, height]
    rgba = torch.cat([torch.zeros(1, 64, 64, 3), torch.linspace(0, 1, 64).expand(1, 64, 64)[..., None]], dim=-1)
    outputs["size.rgba"] = node("UniPic2EditImageSize", image=rgba, longer_edge=64, multiple=32)[0]
    checker = (torch.arange(512)[:, None] + torch.arange(512)).remainder(2).float().expand(3, 512, 512).movedim(0, -1)
    outputs["size.checker"] = node("UniPic2EditImageSize", image=checker[None], longer_edge=64, multiple=32)[0]
    outputs["size.same"] = node("UniPic2EditImageSize", image=INPUTS["image"], longer_edge=96, multiple=32)[0]
    paste_back()


def paste_back():
    """The edit that changes nothing, by way of every fit, alone and enlarged; and one that a mask holds to a spot."""
    original = INPUTS["photo"]
    height, width = original.shape[1:3]
    mask = torch.zeros(1, height, width)
    mask[:, 60:140, 100:200] = 1
    for fit in ("stretch", "crop", "pad"):
        size = {"image": original, "longer_edge": 256, "multiple": 32, "fit": fit, "mask": mask}
        small, *numbers, small_mask, placement = node("UniPic2EditImageSize", **size)
        report[f"paste.{fit}"] = [numbers, placement.source, placement.target]
        outputs[f"paste.{fit}.mask"] = small_mask
        back = {"original": original, "placement": placement, "feather": 0}
        (outputs[f"paste.{fit}"],) = node("UniPic2PasteBack", image=small, **back)
        twice = torch.nn.functional.interpolate(small.movedim(-1, 1), scale_factor=2, mode="bicubic").clamp(0, 1)
        (outputs[f"paste.{fit}.enlarged"],) = node("UniPic2PasteBack", image=twice.movedim(1, -1), **back)
        black = torch.zeros_like(small).repeat(2, 1, 1, 1)
        (outputs[f"paste.{fit}.masked"],) = node("UniPic2PasteBack", image=black, **{**back, "mask": mask})
        (outputs[f"paste.{fit}.drawn_mask"],) = node("UniPic2PasteBack", image=black, **{**back, "mask": small_mask})
        (outputs[f"paste.{fit}.feathered"],) = node(
            "UniPic2PasteBack", image=black, **{**back, "mask": mask, "feather": 10}
        )
    cropped, *_, placement = node("UniPic2EditImageSize", image=original, longer_edge=256, multiple=64, fit="crop")
    report["paste.crop_edges"] = [placement.source, placement.original]
    black_part = {"image": torch.zeros_like(cropped), "original": original, "placement": placement, "feather": 8}
    (outputs["paste.crop_edges"],) = node("UniPic2PasteBack", **black_part)
    whole = node("UniPic2EditImageSize", image=original, longer_edge=256, multiple=32, fit="pad")[3]
    outputs["paste.whole_mask"] = whole
    collect({
        "paste_other_original": lambda: node("UniPic2PasteBack", image=small, **{**back, "original": small}),
        "paste_other_shape": lambda: node("UniPic2PasteBack", image=small[:, :64], **back),
        "paste_batches": lambda: node(
            "UniPic2PasteBack", image=black, **{**back, "original": original.repeat(3, 1, 1, 1)}
        ),
    })  # fmt: skip


def main():
    load_pack()
    with torch.inference_mode():
        dynamic_vram()
        object_info()
        model, clip, vae = node("UniPic2MicroLoader", model="random")
        (editing,) = node("UniPic2EnableEditing", model=model)
        steps = {
            forward: (model, editing),
            text: (clip,),
            sd3_text: (),
            vae_and_latents: (model, vae),
            sampling: (editing, clip, vae),
            in_place: (editing,),
            silent_faults: (model, clip, vae),
            lora: (model, editing),
            single_file: (),
            loader: (model, vae),
            merging: (model, editing),
            compiled: (editing,),
            preview: (model, vae),
            controlnet: (editing,),
            further_gpu: (editing,),
            memory: (editing,),
            areas: (editing,),
            reloading: (model, clip, editing),
            errors: (model, clip, vae),
            pictures: (),
            metaquery: (),
            clip_hooks: (),
        }
        for step, arguments in steps.items():
            start = time.perf_counter()
            step(*arguments)
            report.setdefault("seconds", {})[step.__name__] = round(time.perf_counter() - start, 2)
    tensors = {key: value.float().contiguous().clone() for key, value in outputs.items()}
    save_file(tensors, WORK / "outputs.safetensors")
    (WORK / "report.json").write_text(json.dumps(report))


main()
