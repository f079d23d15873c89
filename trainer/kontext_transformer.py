"""SD3.5-Medium's transformer with a reference picture beside the noisy one (UniPic2-SD3.5M-Kontext).

Shapes: B batch, C latent channels (16), H and W latent height and width (pixels / 8), L text tokens,
N picture tokens (H/2 * W/2), D width of the transformer.
"""

import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import scale_lora_layers, unscale_lora_layers

from ..core.errors import InputError


class SD3Transformer2DKontextModel(SD3Transformer2DModel):
    """`SD3Transformer2DModel` that also reads the clean latents of a reference picture.

    Same parameters, same keys. Reference and noisy latents go through the same patch embedding with the same
    positions, their tokens stand side by side ([reference, noisy]) in every joint and dual attention, and the
    timestep modulates both; only the noisy tokens are decoded. Without a reference it *is* the parent.

    Source: UniPic 2.0 (arXiv 2509.04548), section 3; class name and keys of the published checkpoint.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor = None,
        pooled_projections: torch.Tensor = None,
        timestep: torch.Tensor = None,
        block_controlnet_hidden_states: list | None = None,
        joint_attention_kwargs: dict | None = None,
        return_dict: bool = True,
        skip_layers: list[int] | None = None,
        ref_hidden_states: torch.Tensor | None = None,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict the velocity `noise - latents`.

        Args:
            hidden_states: noisy latents (B, C, H, W).
            encoder_hidden_states: text states (B, L, joint_attention_dim).
            pooled_projections: pooled text (B, pooled_projection_dim).
            timestep: (B,), 0 (clean) to 1000 (noise).
            block_controlnet_hidden_states: ControlNet residuals (B, N, D) for the noisy tokens.
            joint_attention_kwargs: as in diffusers (`scale` sets the strength of LoRAs); may also carry
                `ref_hidden_states`, which is how the stock pipeline loop hands the reference over.
            return_dict: False returns a tuple.
            skip_layers: indices of joint blocks to leave out (skip-layer guidance).
            ref_hidden_states: clean, scaled latents of the reference (B', C, H, W) where B is a multiple of B'
                (classifier-free guidance doubles the batch), or None for text-to-image.

        Returns:
            Velocity (B, C, H, W).

        Raises:
            InputError: the reference's size differs from the target's, or its batch does not divide the target's.
        """
        if joint_attention_kwargs is not None and "ref_hidden_states" in joint_attention_kwargs:
            joint_attention_kwargs = dict(joint_attention_kwargs)
            ref_hidden_states = joint_attention_kwargs.pop("ref_hidden_states")
        if ref_hidden_states is None:
            return super().forward(
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                pooled_projections=pooled_projections,
                timestep=timestep,
                block_controlnet_hidden_states=block_controlnet_hidden_states,
                joint_attention_kwargs=joint_attention_kwargs,
                return_dict=return_dict,
                skip_layers=skip_layers,
            )
        scale = 1.0
        if joint_attention_kwargs is not None:
            joint_attention_kwargs = dict(joint_attention_kwargs)
            scale = joint_attention_kwargs.pop("scale", 1.0)
        scale_lora_layers(self, scale)
        try:
            output = self._forward_with_reference(
                hidden_states,
                self._match_reference(ref_hidden_states, hidden_states),
                self.context_embedder(encoder_hidden_states),
                self.time_text_embed(timestep, pooled_projections),
                block_controlnet_hidden_states,
                joint_attention_kwargs,
                skip_layers or [],
            )
        finally:
            unscale_lora_layers(self, scale)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _forward_with_reference(
        self, hidden_states, reference, text, temb, controlnet_residuals, joint_attention_kwargs, skip_layers
    ) -> torch.Tensor:
        height, width = hidden_states.shape[-2:]
        noisy = self.pos_embed(hidden_states)
        num_ref = noisy.shape[1]
        tokens = torch.cat([self.pos_embed(reference), noisy], dim=1)
        for i, block in enumerate(self.transformer_blocks):
            if i not in skip_layers:
                if torch.is_grad_enabled() and self.gradient_checkpointing:
                    text, tokens = self._gradient_checkpointing_func(block, tokens, text, temb, joint_attention_kwargs)
                else:
                    text, tokens = block(
                        hidden_states=tokens,
                        encoder_hidden_states=text,
                        temb=temb,
                        joint_attention_kwargs=joint_attention_kwargs,
                    )
            if controlnet_residuals is not None and not block.context_pre_only:
                interval = len(self.transformer_blocks) / len(controlnet_residuals)
                residual = controlnet_residuals[int(i / interval)]
                tokens = torch.cat([tokens[:, :num_ref], tokens[:, num_ref:] + residual], dim=1)
        return self._unpatchify(self.proj_out(self.norm_out(tokens[:, num_ref:], temb)), height, width)

    @staticmethod
    def _match_reference(reference: torch.Tensor, noisy: torch.Tensor) -> torch.Tensor:
        batch, ref_batch = noisy.shape[0], reference.shape[0]
        if reference.shape[1:] != noisy.shape[1:] or batch % ref_batch:
            raise InputError(
                "reference latents",
                found=tuple(reference.shape),
                expected=f"{tuple(noisy.shape)} or a batch that divides {batch}",
                remedy="Resize the reference picture to the size of the target before encoding it.",
            )
        return reference.repeat(batch // ref_batch, 1, 1, 1).to(noisy.dtype)

    def _unpatchify(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        p, c = self.config.patch_size, self.out_channels
        grid = tokens.reshape(tokens.shape[0], height // p, width // p, p, p, c)
        return torch.einsum("nhwpqc->nchpwq", grid).reshape(tokens.shape[0], c, height, width)
