"""Reference editing for ComfyUI's SD3 transformer: the maths behind `UniPic2EnableEditing` (no nodes here).

UniPic2-SD3.5M-Kontext has SD3.5-Medium's weights. A reference picture goes through the same patch embedding and
the same centre-cropped position table as the noisy latent, its tokens join the sequence, and only the noisy
tokens are read out (Skywork's `SD3Transformer2DKontextModel`). Nothing marks a token as reference, so their
order is free: noisy tokens come first, as in ComfyUI's other edit models.
"""

import logging
import math

import comfy.conds
import comfy.model_base
import comfy.ops
import torch
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
from comfy.patcher_extension import CallbacksMP, WrapperExecutor, WrappersMP, get_all_wrappers

from ..core.errors import InputError

LATENT_CHANNELS = 16
CALLBACK_KEY = "unipic2_editing"
_BATCH_KEY = "unipic2_batch"
"""What a cond says of the batch it is sampled in."""
_CUT = "resize_cond_for_context_window"
_CUT_TO_WINDOWS = hasattr(comfy.model_base.BaseModel, _CUT)  # from ComfyUI 0.18 on


def enable_editing(model):
    """Return a clone of a stock MODEL that reads the conditioning key `reference_latents`.

    Args:
        model: `comfy.model_patcher.ModelPatcher` around `comfy.model_base.SD3`. It is not changed.

    Without references the clone computes what `model` computes, bit for bit. With them each forward attends to
    noisy and reference tokens together, so its cost follows their sum.

    Raises:
        InputError: the model is not an SD3 transformer (MMDiT).
    """
    if not isinstance(model.model, comfy.model_base.SD3) or not isinstance(model.model.diffusion_model, MMDiT):
        raise InputError(
            "UniPic2 Enable Editing, model",
            found=type(model.model.model_config).__name__,
            expected="SD3 (the MMDiT of Stable Diffusion 3.5, which UniPic2-SD3.5M-Kontext is built on)",
            remedy="Load the UniPic2 transformer with Load Diffusion Model, or use UniPic2 Micro Loader.",
        )
    if not any(getattr(b.x_block, "x_block_self_attn", False) for b in model.model.diffusion_model.joint_blocks):
        logging.warning("UniPic2: this model lacks the second attention of Stable Diffusion 3.5 Medium.")
    patched = model.clone()
    if not isinstance(model.get_model_object("diffusion_model.forward"), KontextForward):
        _patch(patched)
        patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, CALLBACK_KEY, _outer_sample)
        patched.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, CALLBACK_KEY, _prepare_sampling)
        patched.add_callback_with_key(CallbacksMP.ON_CLONE, CALLBACK_KEY, _follow_model)
    return patched


def _patch(patcher):
    """Put the editing methods on `patcher`; they wrap whatever is there now."""
    model = patcher.model
    stock_conds = patcher.get_model_object("extra_conds")
    stock_shapes = patcher.get_model_object("extra_conds_shapes")
    stock_forward = patcher.get_model_object("diffusion_model.forward")
    stock_factors = patcher.get_model_object("memory_usage_factor_conds")

    def extra_conds(**kwargs):
        out = stock_conds(**kwargs)
        references = kwargs.get("reference_latents")
        if references:
            noise = kwargs.get("noise")
            _check_references(references, noise)
            latents = [model.process_latent_in(latent) for latent in references]
            out["ref_latents"] = _References(latents, None if noise is None else noise.shape[-2:])
        return out

    def extra_conds_shapes(**kwargs):
        out = stock_shapes(**kwargs)
        references = kwargs.get("reference_latents")
        if references:
            # One row of as many positions as all references have, each in the batch that `CONDList` will bring it to:
            # what the memory estimate multiplies.
            batch = kwargs.get(_BATCH_KEY)
            positions = sum((batch or latent.shape[0]) * math.prod(latent.shape[2:]) for latent in references)
            out["ref_latents"] = [1, LATENT_CHANNELS, positions]
        return out

    patches = {
        "extra_conds": extra_conds,
        "extra_conds_shapes": extra_conds_shapes,
        "memory_usage_factor_conds": (*stock_factors, "ref_latents"),
        "diffusion_model.forward": KontextForward(model.diffusion_model, stock_forward),
    }
    if _CUT_TO_WINDOWS:
        stock_cut = patcher.get_model_object(_CUT)

        def cut(cond_key, cond_value, window, x_in, device, **kwargs):
            if isinstance(cond_value, _References):
                return cond_value.in_window(window, x_in, device)
            return stock_cut(cond_key, cond_value, window, x_in, device, **kwargs)

        patches[_CUT] = cut
    for name, patch in patches.items():
        patcher.add_object_patch(name, patch)


def _put_on(patcher):
    """Put the patches on before ComfyUI does, which is when it loads a model."""
    skipped, patcher.skip_injection = patcher.skip_injection, True  # injections wait until others are ejected
    try:
        patcher.patch_model(load_weights=False)
    finally:
        patcher.skip_injection = skipped


def _outer_sample(executor, *args, **kwargs):
    """Put the patches on for wrappers that look at the model first: EasyCache reads the shift, which may be one."""
    _put_on(executor.class_obj.model_patcher)
    return executor(*args, **kwargs)


def _prepare_sampling(executor, patcher, noise_shape, conds, *args, **kwargs):
    """Put the patches on before ComfyUI estimates memory.

    The estimate asks each cond alone; what the batch is, to which a reference is repeated, is said to it here.
    """
    _put_on(patcher)
    edits = {name: {bool(cond.get("reference_latents")) for cond in part} for name, part in conds.items() if part}
    for name, kinds in edits.items():
        if len(kinds) > 1:
            logging.warning("UniPic2: of what is combined in %s, one part has a reference and one has none.", name)
    edits = {name: any(kinds) for name, kinds in edits.items()}
    if any(edits.values()) and not all(edits.values()):
        names = (", ".join(name for name, edit in edits.items() if edit is kind) for kind in (False, True))
        logging.warning("UniPic2: %s has no reference, %s has one; UniPic2 Reference takes both prompts.", *names)
    conds = {name: [{**cond, _BATCH_KEY: noise_shape[0]} for cond in part] for name, part in conds.items()}
    return executor(patcher, noise_shape, conds, *args, **kwargs)


class _References(comfy.conds.CONDList):
    """References of a cond; one that holds in an area of the picture sees that area of those of the picture's size."""

    def __init__(self, cond, size=None):
        super().__init__(cond)
        self.size_of_picture = size

    def process_cond(self, batch_size, area=None, **kwargs):
        """Return plain conds of a batch; `area` is (height, width, top, left) in latents."""
        latents = self.cond
        if area is not None:
            height, width, top, left = area
            latents = [
                latent[..., top : top + height, left : left + width]
                if latent.shape[-2:] == self.size_of_picture else latent
                for latent in latents
            ]  # fmt: skip
        return comfy.conds.CONDList(latents).process_cond(batch_size, area=area, **kwargs)

    def in_window(self, window, x_in, device):
        """Return what a context window of the noise sees: of each reference that is as long as it the same part."""
        latents = [
            window.get_tensor(latent, device)
            if window.dim < latent.ndim and latent.shape[window.dim] == x_in.shape[window.dim] else latent.to(device)
            for latent in self.cond
        ]  # fmt: skip
        return _References(latents, window.get_tensor(x_in, device).shape[-2:])


def _follow_model(patcher, clone):
    """Patch again when a clone carries other weights: ComfyUI gives each further GPU a freshly loaded model."""
    if clone.model is patcher.model:
        return
    for name in ("extra_conds", "extra_conds_shapes", "memory_usage_factor_conds", "diffusion_model.forward", _CUT):
        clone.object_patches.pop(name, None)
    _patch(clone)


def _check_positions(latents, max_patches):
    """Require that a model has positions for all of some latents (B, 16, h, w); None has them for any."""
    for latent in latents:
        height, width = latent.shape[-2:]
        if max_patches is not None and max(height, width) > 2 * max_patches:
            raise InputError(
                "picture to sample",
                found=f"{8 * width}x{8 * height} pixels",
                expected=f"at most {16 * max_patches}x{16 * max_patches}, for which this model has positions",
                remedy="Take a smaller latent, or lower longer_edge of UniPic2 Edit Image Size; micro models draw 64.",
            )


def _check_references(references, noise):
    for latent in references:
        if latent.ndim != 4 or latent.shape[1] != LATENT_CHANNELS:
            raise InputError(
                "reference latent",
                found=f"shape {tuple(latent.shape)}",
                expected=f"(batch, {LATENT_CHANNELS}, height/8, width/8)",
                remedy="Encode the reference with the VAE of SD3.5 (or of the micro model).",
            )
        if noise is not None and latent.shape[0] > noise.shape[0]:
            raise InputError(
                "reference latent",
                found=f"{latent.shape[0]} references for a batch of {noise.shape[0]}",
                expected="at most one for each picture that is drawn",
                remedy="To edit them in parts, put Rebatch Images before UniPic2 Reference.",
            )
        if noise is not None and latent.shape[-2:] != noise.shape[-2:]:
            logging.warning(
                "UniPic2: the reference has %dx%d latents, the picture %dx%d. UniPic2 was trained on equal sizes.",
                *(latent.shape[-1], latent.shape[-2], noise.shape[-1], noise.shape[-2]),
            )


class KontextForward:
    """Stand-in for `diffusion_model.forward` that accepts `ref_latents` and runs DIFFUSION_MODEL wrappers.

    ComfyUI's SD3 has no such wrappers of its own, so nodes like EasyCache start to work on a patched model.
    """

    def __init__(self, diffusion_model, stock_forward):
        self.diffusion_model = diffusion_model
        self.stock_forward = stock_forward

    def __call__(
        self,
        x,
        timesteps,
        context=None,
        y=None,
        control=None,
        transformer_options=None,
        ref_latents=None,
        **kwargs,
    ):
        """Predict the velocity.

        Args:
            x: noisy latents `(B, 16, h, w)`, scaled as the model reads them.
            timesteps: `(B,)`, 0 to 1000.
            context, y: text states `(B, T, joint_attention_dim)` and pooled text `(B, pooled_projection_dim)`.
            control: ControlNet residuals for the noisy tokens.
            ref_latents: list of `(B, 16, h, w)`, scaled; None or empty is text-to-image.

        Returns:
            `(B, 16, h, w)`.
        """
        options = {} if transformer_options is None else transformer_options
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options)
        if wrappers:  # EasyCache writes into its input, which in float32 is the sampler's own tensor
            x = x.clone()
        executor = WrapperExecutor.new_class_executor(self._forward, self.diffusion_model, wrappers)
        return executor.execute(x, timesteps, context, y, control, options, ref_latents=ref_latents, **kwargs)

    def _forward(self, x, timesteps, context, y, control, transformer_options, ref_latents=None, **kwargs):
        _check_positions([x, *(ref_latents or ())], self.diffusion_model.pos_embed_max_size)
        if ref_latents and not _CUT_TO_WINDOWS and "context_window" in transformer_options:
            remedy = "Update ComfyUI, or edit without Context Windows."
            expected = "ComfyUI 0.18 or newer, which can cut references to them"
            raise InputError("context windows", found="an edit in them", expected=expected, remedy=remedy)
        if not ref_latents:
            options = {"control": control, "transformer_options": transformer_options}
            return self.stock_forward(x, timesteps, context=context, y=y, **options, **kwargs)
        return forward_with_references(
            self.diffusion_model, x, timesteps, context, y, control, transformer_options, ref_latents
        )


def forward_with_references(transformer, x, timesteps, context, y, control, transformer_options, ref_latents):
    """Run ComfyUI's `MMDiT` over noisy and reference tokens; arguments and result as in `KontextForward`."""
    if transformer.context_processor is not None:
        context = transformer.context_processor(context)
    modulation = transformer.t_embedder(timesteps, dtype=x.dtype)
    if y is not None and transformer.y_embedder is not None:
        modulation = modulation + transformer.y_embedder(y)
    if context is not None:
        context = transformer.context_embedder(context)

    noisy = _tokens(transformer, x)
    tokens = torch.cat([noisy, *(_tokens(transformer, latent) for latent in ref_latents)], dim=1)
    control = _pad_control(control, tokens.shape[1])
    out = transformer.forward_core_with_concat(tokens, modulation, context, control, transformer_options)

    height, width = x.shape[-2:]
    return transformer.unpatchify(out[:, : noisy.shape[1]], hw=(height, width))[:, :, :height, :width]


def _tokens(transformer, latents):
    positions = transformer.cropped_pos_embed(latents.shape[-2:], device=latents.device)
    return transformer.x_embedder(latents) + comfy.ops.cast_to_input(positions, latents)


def _pad_control(control, length):
    """Extend ControlNet residuals `(B, T, C)` with zeros to `length` tokens: references get no control."""
    if control is None or not control.get("output"):
        return control

    def pad(residual):
        missing = 0 if residual is None else length - residual.shape[1]
        return torch.nn.functional.pad(residual, (0, 0, 0, missing)) if missing > 0 else residual

    return {**control, "output": [pad(residual) for residual in control["output"]]}
